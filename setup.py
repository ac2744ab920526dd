"The pipelines travel in the package; all metadata stand in pyproject.toml."

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).resolve().parent


class BuildWithPipelines(build_py):
    "Puts a copy of pipelines/ into the built package; an editable one finds them in the checkout."

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "hybrid_nb" / "pipelines"
            shutil.rmtree(target, ignore_errors=True)
            for source in sorted([*here.glob("pipelines/*.ipynb"), *here.glob("pipelines/params/*.yaml")]):
                place = target / source.relative_to(here / "pipelines")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, place)


setup(cmdclass={"build_py": BuildWithPipelines})
