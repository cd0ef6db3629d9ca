"""Build the package with its two start-up files; everything that can be static is in pyproject.toml.

Stock nnU-Net finds trainers of other packages through the environment variable nnUNet_extTrainer. To set it
without asking the user, two small files go into the root of site-packages, and pip removes them with the
package: a `.pth` file, whose import line Python runs at start, and a `.start` file of the same name, which
replaces it from Python 3.15 on (PEP 829). Both call nnunetv2_dycon._register.register.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

# site.py reads these files in the order of their names, so ours must sort after "__editable__...": only then
# is an editable install importable when our line runs. A package that is gone must not break every start.
START_UP = {
    "nnunetv2_dycon_ext.pth": (
        "import sys; exec('try:\\n import nnunetv2_dycon._register\\nexcept ImportError:\\n pass\\n"
        "else:\\n nnunetv2_dycon._register.register()')\n"
    ),
    "nnunetv2_dycon_ext.start": "nnunetv2_dycon._register:register\n",
}


class BuildWithStartUp(build_py):
    """Puts the start-up files next to the package, at the root of a regular wheel."""

    def _start_up_paths(self) -> list[Path]:
        return [] if self.editable_mode else [Path(self.build_lib, name) for name in START_UP]

    def run(self) -> None:
        """Build as always, then write the start-up files."""
        super().run()
        for path in self._start_up_paths():
            path.write_text(START_UP[path.name])

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return all files that the wheel has to hold."""
        return [*super().get_outputs(include_bytecode), *map(str, self._start_up_paths())]


class EditableWithStartUp(editable_wheel):
    """Adds the start-up files to the wheel of `pip install -e`, which build_py has no part in."""

    def run(self) -> None:
        """Build the editable wheel as always, then add the start-up files to it."""
        super().run()
        (wheel,) = Path(self.dist_dir).glob("nnunetv2_dycon-*.whl")
        add_to_wheel(wheel, START_UP)


def add_to_wheel(wheel: Path, files: dict[str, str]) -> None:
    """Rewrite `wheel` with further root files (name to text), entered in its RECORD."""
    records = "".join(f"{name},sha256={_digest(text)},{len(text.encode())}\n" for name, text in files.items())
    with zipfile.ZipFile(wheel) as archive:
        content = [(item, archive.read(item)) for item in archive.infolist()]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        for item, data in content:
            is_record = item.filename.endswith(".dist-info/RECORD")
            archive.writestr(item, data + records.encode() if is_record else data)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


if __name__ == "__main__":  # nnU-Net's finder imports every file of a folder that a user points it at
    converters = find_packages(include=["dataset_conversion", "dataset_conversion.*"])
    setup(
        packages=[
            *find_packages(include=["nnunetv2_dycon", "nnunetv2_dycon.*"]),
            *(f"nnunetv2_dycon.{name}" for name in converters),
        ],
        package_dir={"nnunetv2_dycon.dataset_conversion": "dataset_conversion"},
        package_data={
            "nnunetv2_dycon": [
                "_nnunet_ext/*.py",
                "conversion/published/*.json",
                "evaluation/*.json",
                "evaluation/*.html",
            ]
        },
        include_package_data=False,
        cmdclass={"build_py": BuildWithStartUp, "editable_wheel": EditableWithStartUp},
    )
