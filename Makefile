# make demo: set up and train a small model in an executed report.   make test: everything that CI runs.
PYTHON ?= python3
VENV ?= .venv
# Where pip takes torch from, for another build than PyPI's: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
OUT ?= .

BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
QUIET := KINETO_LOG_LEVEL=99
METADATA := settings.ini setup.py pyproject.toml constraints.txt

.PHONY: setup hooks demo test type-check sync reports docs readme clean

$(VENV)/.base: $(METADATA)
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f'$(PYTHON) is Python {v[0]}.{v[1]}; 3.11 to 3.13 are tried: make PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev,hub]"
	touch $@

setup: $(VENV)/.dev

# For this clone alone, in .git/config: notebooks are cleaned as they are committed, and merged cell by cell.
hooks:
	@test -x $(BIN)/nbdev_merge || { echo "no $(BIN)/nbdev_merge: make setup first"; exit 1; }
	git config filter.nbdev-clean.clean '"$(abspath $(BIN))/python" hooks/clean.py %f'
	git config merge.nbdev-merge.name "notebooks, cell by cell"
	git config merge.nbdev-merge.driver '"$(abspath $(BIN))/nbdev_merge" %O %A %B %P'

demo: $(VENV)/.base
	$(BIN)/hnb run train

# Pipelines run in a copy as well: with run folders of their own, so that no earlier run is taken for theirs.
test: $(VENV)/.dev sync
	$(OFFLINE) $(QUIET) OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing --path nbs
	@bin=$$(cd $(BIN) && pwd) && copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
	cp -R settings.ini constraints.txt pipelines hybrid_nb "$$copy" && cd "$$copy" && \
	$(OFFLINE) $(QUIET) PYTHONPATH="$$copy" "$$bin/nbdev_test" --n_workers 1 --timing --path pipelines
	$(BIN)/ruff check nbs pipelines tests hooks docs setup.py
	$(BIN)/mypy
	$(OFFLINE) $(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests

# The annotations of hybrid_nb/, by [tool.mypy] in pyproject.toml.
type-check: $(VENV)/.dev
	$(BIN)/mypy

# In a copy, so that work in progress is never rewritten: export and clean must change nothing.
sync: $(VENV)/.dev
	@bin=$$(cd $(BIN) && pwd) && copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
	cp -R settings.ini nbs pipelines hybrid_nb "$$copy" && \
	(cd "$$copy" && "$$bin/nbdev_export" && "$$bin/nbdev_clean" && "$$bin/nbdev_clean" --fname pipelines) && \
	for d in nbs pipelines hybrid_nb; do \
	  diff -rq -x __pycache__ -x .ipynb_checkpoints -x .last_checked $$d "$$copy/$$d" || \
	  { echo "nbdev_export or nbdev_clean changes $$d/: run both and commit"; exit 1; }; done

reports: $(VENV)/.base
	$(BIN)/hnb run train
	$(BIN)/hnb run train -p model large
	test ! -d data/tinystories || $(BIN)/hnb run train -p model pipelines/params/tinystories.yaml
	test ! -d data/tinystories || $(BIN)/hnb run srte -f pipelines/params/srte.yaml
	$(BIN)/hnb run benchmark -p shape both -p full true
	$(BIN)/hnb run scaling -p full true
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 $(BIN)/hnb run qk_speed -p model gpt-base -p rounds 61 -p precision bf16
	$(BIN)/hnb run projector -p full true -p seeds 2
	$(BIN)/hnb run parallel -p rounds 20
	test ! -d data/tinystories || for p in qk_freeze distill context foundation dense; do $(BIN)/hnb run $$p -f pipelines/params/$$p.yaml || exit 1; done
	test ! -d data/tinystories || $(BIN)/hnb run distill -f pipelines/params/distill.yaml -p settings kv_weight=0.1
	test ! -d data/tinystories || $(BIN)/hnb run dense -f pipelines/params/dense.yaml \
	  -p overrides "n_layer=6 d_model=192 n_head=8 n_kv_head=2 d_ff=672 n_shared_experts=2 moe_d_ff=168 max_seq_len=128 seq_len=128 batch_size=16 warmup_steps=24 eval_interval=80 save_interval=240"
	test ! -d data/gsm8k || $(BIN)/hnb run finetune -f pipelines/params/finetune.yaml
	test ! -d data/gsm8k || $(BIN)/hnb run finetune -f pipelines/params/finetune.yaml -p data data/gsm8k/train.jsonl \
	  -p overrides "n_layer=4 d_model=128 n_head=4 d_ff=512 vocab_size=2048 bpe_vocab=2048 batch_size=16 seq_len=256 lr=3e-3 compile=no text_key=question"
	$(BIN)/hnb run audit

PAGES := nbs/index.ipynb $(wildcard nbs/docs/*.ipynb)

docs: $(VENV)/.dev
	PYTHONWARNINGS=ignore $(BIN)/python -m jupyter nbconvert --log-level WARN --to notebook --execute --inplace $(PAGES)
	for page in $(PAGES); do $(BIN)/nbdev_clean --fname $$page || exit 1; done
	$(MAKE) readme

# The README and the generated pages of docs/ from their executed notebooks, into the folder OUT.
readme:
	@$(BIN)/python docs/build.py $(OUT)

clean:
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find nbs pipelines tests hybrid_nb -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
