"""Epochs and trainers of the trainings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.self_training.lengths import share_epochs, trainer_of_length

# ---- lengths and names ---------------------------------------------------------------------------------------


@given(total=st.integers(1, 5000), rounds=st.integers(1, 4))
def test_the_trainings_together_have_the_total_and_are_nearly_alike(total, rounds):
    if total <= rounds:
        with pytest.raises(ConfigError, match="--epochs"):
            share_epochs([total], rounds)
        return
    each = share_epochs([total], rounds)
    assert len(each) == rounds + 1
    assert sum(each) == total
    assert len(set(each[:-1])) == 1
    assert 0 <= each[-1] - each[0] <= rounds


def test_epochs_may_be_given_for_each_training():
    assert share_epochs([30, 70], 1) == (30, 70)


@pytest.mark.parametrize(("epochs", "rounds"), [([1, 2, 3], 1), ([10, 20], 2), ([10, 0], 1), ([10], 0)])
def test_epochs_that_do_not_fit_the_rounds_are_refused(epochs, rounds):
    with pytest.raises(ConfigError, match=r"--epochs|--as"):
        share_epochs(epochs, rounds)


@pytest.mark.parametrize(
    ("trainer", "epochs", "name"),
    [
        ("nnUNetTrainer", 1000, "nnUNetTrainer"),
        ("nnUNetTrainer", 500, "nnUNetTrainer_500epochs"),
        ("nnUNetTrainer", 1, "nnUNetTrainer_1epoch"),
        ("nnUNetTrainerLabeledOnly", 333, "nnUNetTrainerLabeledOnly_epochs333"),
        ("nnUNetTrainerLabeledOnly_iters5_seed0", 7, "nnUNetTrainerLabeledOnly_iters5_seed0_epochs7"),
    ],
)
def test_a_training_has_the_trainer_of_its_length(trainer, epochs, name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_dycon.trainers.names import trainer_class

    assert trainer_of_length(trainer, epochs) == name
    if "LabeledOnly" in name:
        assert trainer_class(name).settings.epochs == epochs
    else:
        found = recursive_find_trainer_class_by_name(name)
        stock = (epochs == 1000 and found.__name__ == "nnUNetTrainer") or found.__name__.endswith(f"{epochs}epochs")
        assert stock or epochs == 1


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("nnUNetTrainer", "no trainer of 333 epochs.*nnUNetTrainerLabeledOnly"),
        ("nnUNetTrainerDyCON", "nnUNetTrainerLabeledOnly"),
        ("nnUNetTrainer_50epochs", "give nnUNetTrainer"),
        ("nnUNetTrainerLabeledOnly_epochs5", "leave epochs out"),
        ("nnUNetTrainerLabeledOnly_itres5", "nearest is 'iters'|iters"),
    ],
)
def test_other_trainers_are_refused(trainer, said):
    with pytest.raises(ConfigError, match=said):
        trainer_of_length(trainer, 333)
