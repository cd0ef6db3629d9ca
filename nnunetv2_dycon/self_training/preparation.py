"""Plans and preprocessing of a round's data set, with the plans of the first data set."""

from dataclasses import dataclass
from pathlib import Path

from nnunetv2_dycon.data.splits import SPLITS_FILE
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import list_visible, read_json_object, write_bytes, writing
from nnunetv2_dycon.self_training import running
from nnunetv2_dycon.self_training.experiment import DataSet, Experiment

_NAMES = ("dataset_name", "plans_name")  # in the plans
_FINGERPRINT = "dataset_fingerprint.json"


@dataclass(frozen=True)
class Preparation:
    """The steps between the raw data set of a round and its training."""

    experiment: Experiment
    data: DataSet

    def is_planned(self) -> bool:
        """Return whether all files of nnU-Net's planner are there, with the plans of the first data set.

        Raises
        ------
        DataError
            If the plans are not those of the first data set.
        """
        copies = self._copies()
        if not all(copy.is_file() for copy in copies.values()):
            return False
        try:
            plans = read_json_object(self.data.preprocessed / f"{self.experiment.plans_name}.json")
        except DataError:  # not there, or cut short by a kill
            return False
        first = self.experiment.plans
        changed = sorted(key for key in {*plans, *first} - {*_NAMES} if plans.get(key) != first.get(key))
        if changed:
            raise DataError(
                f"plans of {self.data.preprocessed} differ from those of {self.experiment.data.preprocessed} in "
                f"{', '.join(changed)}: restore the plans, or delete {self.data.raw}, "
                f"{self.data.preprocessed} and {self.data.results} to make the round again"
            )
        return all(source.read_bytes() == copy.read_bytes() for source, copy in copies.items())

    def _copies(self) -> dict[Path, Path]:
        """Return the files that are copied with the plans, and their copies."""
        fingerprint = self.experiment.data.preprocessed / _FINGERPRINT
        sources = [self.data.raw / "dataset.json", self.data.raw / SPLITS_FILE]
        sources += [fingerprint] if fingerprint.is_file() else []
        return {source: self.data.preprocessed / source.name for source in sources}

    def copy_words(self) -> list[str]:
        """Return the command that copies the files that go with the plans."""
        return ["cp", *map(str, self._copies()), f"{self.data.preprocessed}/"]

    def plan_words(self) -> list[str]:
        """Return the command that copies the plans."""
        ids = ["-s", str(self.experiment.data.id), "-t", str(self.data.id)]
        return ["nnUNetv2_move_plans_between_datasets", *ids, "-sp", self.experiment.plans_name]

    def plan(self, lock: int | None) -> None:
        """Copy the plans and the files that go with them."""
        with writing(self.data.preprocessed, "or set nnUNet_preprocessed"):
            self.data.preprocessed.mkdir(exist_ok=True)
        for source, copy in self._copies().items():
            write_bytes(copy, source.read_bytes())
        running.call(self.plan_words(), lock)

    def is_preprocessed(self) -> bool:
        """Return whether every case with a label is preprocessed."""
        if not self.data.raw.is_dir():
            return False
        folder, ending = self.data.preprocessed, self.experiment.ending
        cases = [path.name.removesuffix(ending) for path in list_visible(self.data.raw / "labelsTr", ending)]
        return all(
            _has_content(folder / self.experiment.data_identifier / f"{case}.pkl")  # nnU-Net writes it last for a case
            and (folder / "gt_segmentations" / f"{case}{ending}").is_file()
            for case in cases
        )

    def preprocess_words(self) -> list[str]:
        """Return the command that preprocesses."""
        experiment = self.experiment
        words = ["nnUNetv2_preprocess", "-d", str(self.data.id), "-plans_name", experiment.plans_name]
        return [*words, "-c", experiment.configuration, "-np", str(experiment.processes)]

    def preprocess(self, lock: int | None) -> None:
        """Preprocess all cases."""
        running.call(self.preprocess_words(), lock)


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
