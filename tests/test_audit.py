"""The audit of the design documents: one claim of each verdict, altered figures, and its report as a user makes it."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid_nb.config.config import asdict
from hybrid_nb.config.presets import get_config
from hybrid_nb.experiments import audit
from hybrid_nb.experiments.audit import CLAIMS, Measurement, trainable
from hybrid_nb.report.index import read_result
from hybrid_nb.report.vocabulary import FAILS, HOLDS, NOT_SHOWN, NOT_TESTABLE, VERDICTS
from hybrid_nb.study.findings import as_span

ROOT = Path(__file__).resolve().parent.parent
HNB = str(Path(sys.executable).parent / "hnb")


def find(document: str, line: int, words: str) -> audit.Claim:
    "The one claim of a line whose statement holds some words."
    found = [c for c in CLAIMS if (c.document, c.line) == (document, line) and words in c.statement]
    assert len(found) == 1, found
    return found[0]


def verdict(claim: audit.Claim, **measured) -> str:
    "The verdict on a claim, given measurements by the name of their figure."
    found = {key.replace("__", "."): Measurement(as_span(value), "report") for key, value in measured.items()}
    return audit.judge_claim(claim, found).verdict


def test_a_claim_of_each_verdict():
    assert verdict(find("004", 23, "parameters")) == HOLDS
    assert verdict(find("004", 28, "tokens a step")) == FAILS
    assert verdict(find("003", 87, "40 layers")) == NOT_TESTABLE
    assert verdict(find("000", 98, "almost no loss")) == NOT_TESTABLE
    assert verdict(find("000", 98, "almost no loss"), srte__shared=(0, -1, 1), srte__none=(0, -1, 1)) == NOT_SHOWN


@pytest.mark.parametrize(
    "stated, expected",
    [("208,638,720", HOLDS), ("208,638,721", FAILS), ("~209e6", HOLDS), ("~230e6", FAILS), ("<=2e8", FAILS), (">2e8", HOLDS)],
)
def test_another_stated_figure_is_another_verdict(stated, expected):
    assert verdict(replace(find("004", 23, "parameters"), stated=stated)) == expected


def test_a_failing_figure_holds_once_it_is_put_right():
    found = audit.audit({})
    for finding in found:
        if finding.verdict == FAILS and finding.span.low == finding.span.high:
            right = replace(finding.claim, stated=f"{finding.span.value:.12g}")
            assert verdict(right) == (NOT_TESTABLE if right.bound else HOLDS), right


def test_a_measurement_decides():
    claim = find("000", 9, "sines")
    assert [verdict(claim, srte__sincos=x) for x in ((1, -1, 3), (7, 5.2, 8.9), (4, 2, 6))] == [HOLDS, FAILS, NOT_SHOWN]


def test_a_bound_refutes_and_never_confirms():
    claim = find("001", 234, "1 A100")
    assert verdict(claim) == NOT_TESTABLE
    assert verdict(replace(claim, stated="<=1")) == FAILS


def test_the_numbers_known_by_hand():
    known = {("000", 15, "original: parameters"): 22_143_967_232 / 1e9, ("000", 134, "24 layers"): 2_592_264_192 / 1e9,
             ("001", 24, "large: parameters, the trainable ones"): 259_360_768 / 1e6,
             ("001", 24, "large: parameters, all"): (259_360_768 + 24 * 3 * 1024**2) / 1e6,
             ("001", 31, "small: trainable parameters saved, K and V"): 100 * 6 * 2 * 512**2 / (30_553_088 + 6 * 3 * 512**2),
             ("001", 223, "base: gradients, as a mixed"): 4 * trainable("base") / 2**30,
             ("002", 14, "OELM: frozen parameters"): 6 * 2 * 512**2,
             ("003", 325, "adapters"): 8192 * (8192 + 2048) / (3584 * (3584 + 2048)),
             ("004", 75, "parameters added"): 24 * 2 * 768 * 192 / 1e6, ("004", 30, "tokens a step"): 4 * 2048 * 16,
             ("003", 292, "parameters of a transformer block"): 12 * 5120**2 / (5120**2 + 5120 * 1536)}
    for (document, line, words), value in known.items():
        found = audit.judge_claim(find(document, line, words), {}).span.value
        assert math.isclose(found, value, rel_tol=1e-12), (document, line, found, value)


def test_every_figure_of_the_documents_is_there_once():
    keys = [(c.document, c.line, c.statement, c.stated) for c in CLAIMS]
    assert len(keys) == len(set(keys)) > 200
    assert {c.document for c in CLAIMS} == set(audit.DOCUMENTS)
    last = {"000": 198, "001": 479, "002": 385, "003": 444, "004": 79}
    assert all(1 <= c.line <= last[c.document] for c in CLAIMS)


def test_every_formula_is_evaluated_or_not_measured():
    for finding in audit.audit({}):
        missing = finding.why.startswith("not measured yet: hnb run ")
        assert finding.span is not None or missing or not finding.claim.formula
        assert missing == ("measured(" in finding.claim.formula)


def test_every_failure_is_a_sentence_with_its_numbers():
    for finding in audit.audit({}):
        if finding.verdict == FAILS:
            text = audit.sentence(finding)
            assert "\n" not in text and audit.value_text(finding) in text and finding.claim.note in text


def test_settings_are_carried_and_an_altered_one_is_found():
    assert [(s.document, s.line, audit.strays(s)) for s in audit.SETTINGS if audit.strays(s)] == [("003", 226, {7_473: 0.2})]
    for setting in audit.SETTINGS:
        name = next(iter(setting.stated))
        altered = audit.strays(replace(setting, stated=setting.stated | {name: object()}))
        assert altered.keys() == {name} | audit.strays(setting).keys()


def test_a_figure_that_no_report_holds_is_not_made_up():
    assert audit.read_measurements(ROOT / "no such folder") == {}
    assert audit.read_benchmark({"rows": [{"shape": "t", "contender": "another", "tokens_per_s": 1.0}]}) == {}


def test_a_control_that_is_admitted_leaves_a_claim_open():
    claim = find("000", 98, "almost no loss")
    assert claim.control == "srte.none"
    assert verdict(claim, srte__shared=(0, -1, 1), srte__none=(12, 10, 14)) == HOLDS
    assert verdict(claim, srte__shared=(0, -1, 1), srte__none=(0, -1, 1)) == NOT_SHOWN
    assert verdict(claim, srte__shared=(8, 7, 9), srte__none=(0, -1, 1)) == FAILS


def test_reports_are_read_as_they_are(tmp_path):
    rows = [{"shape": "t", "contender": f"hybrid-nb, {p}", "tokens_per_s": r} for p, r in (("bf16", 3.0), ("fp32", 2.0))]
    result = {"pipeline": "benchmark", "subject": "x", "verdict": HOLDS, "headline": {}, "rows": rows}
    other = result | {"pipeline": "other"}
    for name, shown in (("benchmark-x-aaaaaa", result), ("benchmark-x-bbbbbb.FAILED", result), ("other-x-cccccc", other), ("notes", None)):
        (tmp_path / f"{name}.json").write_text(json.dumps(shown or {"title": "notes"}))
    assert audit.read_measurements(tmp_path) == {"benchmark.half": Measurement(as_span(1.5), "benchmark-x-aaaaaa", "shape t")}


def test_the_weightiest_of_several_reports_counts(tmp_path):
    "Whatever its name: a trial with fewer rounds takes no figure from a measurement."
    for name, rounds, factor in (("qk_speed-x-aaaaaa", 9, 1.0), ("qk_speed-x-ffffff", 3, 2.0)):
        turns = {"index": [*range(rounds)], "columns": ["B, trainable", "C, frozen", "skipped work"]}
        turns["data"] = [[2.0 * factor, 1.9, 0.1]] * rounds
        bundle = {"schema": 1, "kind": "speed", "info": {"config": asdict(get_config("gpt-base"))},
                  **dict.fromkeys(("turns", "parts", "ops"), turns)}
        shown = {"pipeline": "qk_speed", "subject": "x", "verdict": HOLDS, "headline": {}, "bundle": bundle}
        (tmp_path / f"{name}.json").write_text(json.dumps(shown))
    (found,) = audit.read_measurements(tmp_path).values()
    assert found.report == "qk_speed-x-aaaaaa" and math.isclose(found.span.value, 100 * (2.0 / 1.9 - 1))


def test_numbers_of_a_bundle_are_finite():
    spans = [x for m in audit.pack(audit.Audit(audit.read_measurements(ROOT / "reports")))["measurements"].values() for x in m["span"]]
    assert all(map(math.isfinite, spans))


@pytest.fixture(scope="module")
def report(copy) -> Path:
    "The report that `hnb run audit` makes in a copy without other reports."
    done = subprocess.run([HNB, "run", "audit"], cwd=copy, capture_output=True, text=True, env=environment(copy))
    assert done.returncode == 0, done.stderr
    return next((copy / "reports").glob("audit-all-*.ipynb"))


def environment(copy: Path) -> dict[str, str]:
    "This process's environment with the copy's package."
    return dict(os.environ) | {"PYTHONPATH": str(copy)}


def test_the_report_needs_no_other_reports(report):
    result = read_result(report)
    assert result["bundle"]["measurements"] == {}
    assert result["headline"]["figures"] == len(CLAIMS)
    assert sum(result["headline"][v] for v in VERDICTS) == len(CLAIMS)
    assert result["verdict"] == FAILS and result["results"]["because"]


def test_the_report_is_verified_and_an_altered_one_is_not(report, copy, tmp_path):
    def verify(path: Path) -> subprocess.CompletedProcess:
        return subprocess.run([HNB, "verify", str(path)], cwd=copy, capture_output=True, text=True, env=environment(copy))

    assert verify(report).returncode == 0, verify(report).stderr
    altered = tmp_path / report.name
    altered.write_bytes(report.read_bytes())
    altered.with_suffix(".json").write_text(report.with_suffix(".json").read_text().replace('"2.592"', '"7.000"'))
    done = verify(altered)
    assert done.returncode == 65 and "table 000" in done.stderr
