"""Pictures and rankings with the networks and patches that nnU-Net plans; snapshots of a training."""

from pathlib import Path

import pytest
import torch

from nnunetv2_dycon.annotation.rank import rank
from nnunetv2_dycon.checkpoint import KEY, read_checkpoint
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.pictures.gradcam import plot_gradcam
from nnunetv2_dycon.pictures.landscape import plot_landscape
from nnunetv2_dycon.pictures.uncertainty import plot_uncertainty
from nnunetv2_dycon.trained import open_trained
from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits
from tests.trained import NAME, write_training
from tests.training import begin, make_trainer, run_epochs, same
from tests.unit.test_networks_and_plans import anisotropic, plans_of, residual


def draw_all(fold: Path, name: str, configuration: str) -> None:
    path = fold / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content[KEY]["cases"] = {"labeled": ["l_00", "l_01"], "validation": ["l_02"], "unlabeled": ["u_00", "u_01"]}
    torch.save(content, path)
    common = {"configuration": configuration, "device": "cpu"}
    assert rank(901, name, mirroring=False, **common).cases
    assert len(plot_uncertainty(901, name, number=1, mirroring=False, **common).figures) == 2
    assert plot_gradcam(901, name, **common).figures
    assert plot_landscape(901, name, size=3, **common).figures


@pytest.mark.parametrize(("change", "method"), [(residual, "DyCONCPS"), (anisotropic, "DyCON")])
def test_residual_and_anisotropic_networks_have_all_pictures(tiny: Path, change, method: str) -> None:
    preprocess_unlabeled(901, processes=1)
    name = f"nnUNetTrainer{method}_epochs4_iters2_seed3"
    draw_all(write_training(name, plans=change(plans_of(tiny))), name, "3d_fullres")


def test_2d_with_two_channels_and_four_classes_has_all_pictures(tmp_path: Path, monkeypatch) -> None:
    for variable, folder in environment(tmp_path).items():
        monkeypatch.setenv(variable, folder)
    names = make_dataset(tmp_path, labeled=3, unlabeled=2, test=1, channels=2, classes=3)
    write_splits(tmp_path, names.dataset, train=names.labeled[:2], val=names.labeled[2:])
    plan_and_preprocess(root=tmp_path, configurations=("2d",))
    preprocess_unlabeled(901, ("2d",), processes=1)
    draw_all(write_training(NAME, configuration="2d"), NAME, "2d")


def test_snapshots_of_a_training_hold_both_networks_and_are_never_continued(tiny: Path) -> None:
    trainer = begin(make_trainer(NAME))
    run_epochs(trainer, 2)
    fold = Path(trainer.output_folder)
    assert [path.name for path in fold.glob("snapshot*")] == ["snapshot_epoch0002.pth"]
    content = read_checkpoint(fold / "snapshot_epoch0002.pth")
    assert same(content["network_weights"], unwrap(trainer.network).state_dict())
    assert same(content[KEY]["teacher"], trainer.method.teacher.network.state_dict())
    assert content["current_epoch"] == 2
    assert content[KEY]["step"] == 4
    assert not {"optimizer_state", "logging"} & content.keys()
    assert "optimizer" not in content[KEY]
    x = torch.randn(1, 1, 16, 16, 16)
    trained = open_trained(fold / "snapshot_epoch0002.pth")
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        trainer.network.eval()
        torch.testing.assert_close(trained.network("student")(x), trainer.network(x))
        torch.testing.assert_close(trained.network("teacher")(x), trainer.method.teacher.network(x))
    trainer.set_deep_supervision_enabled(True)
    run_epochs(trainer, 1)
    assert len(list(fold.glob("snapshot*"))) == 1
