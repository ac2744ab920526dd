"Package metadata, read from settings.ini so that it is written down once, and the pipelines, which travel in the package."

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
readme = here / "README.md"


class BuildWithPipelines(build_py):
    "Puts a copy of pipelines/ into the built package; an editable one finds them in the checkout."

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / cfg["lib_path"] / "pipelines"
            shutil.rmtree(target, ignore_errors=True)
            for source in sorted([*here.glob("pipelines/*.ipynb"), *here.glob("pipelines/params/*.yaml")]):
                place = target / source.relative_to(here / "pipelines")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, place)


setup(
    name=cfg["repo"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "hub", "slurm", "peft")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "papermill.engine": ["hybrid_nb=hybrid_nb.cli.engine:HybridEngine"],
    },
    cmdclass={"build_py": BuildWithPipelines},
)
