"""Whole images through a trained network: nnU-Net's preprocessing and sliding window, then entropies on the image.

Arrays of an image have nnU-Net's axes, (Z, Y, X) of a NIfTI file; a 2D image has a first axis of one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunetv2_dycon.data.readers import check_nifti, reading
from nnunetv2_dycon.files import whole_file
from nnunetv2_dycon.losses.voxels import entropy, voxel_blocks, widen
from nnunetv2_dycon.trained import Trained


class Prepared(NamedTuple):
    """An image as the network takes it.

    Attributes
    ----------
    data : Tensor, shape (C, *S)
        Channels, resampled and normalised.
    properties : dict
        nnU-Net's record of how to return to the image.
    shown : array, shape (Z, Y, X)
        The first channel as nnU-Net's reader sees it.
    """

    data: Tensor
    properties: dict[str, Any]
    shown: NDArray


class Prediction(NamedTuple):
    """What one network says of an image.

    Attributes
    ----------
    labels : array, shape (Z, Y, X), unsigned integer
        The predicted class of each voxel.
    entropy : array, shape (Z, Y, X), float32
        Entropy of the classes in nats, that of the losses; 0 outside of nnU-Net's box around what is not zero.
    expected : array, shape (C,)
        Sum over voxels of the probability of each class, background first; outside of the box it is background.
    """

    labels: NDArray
    entropy: NDArray[np.float32]
    expected: NDArray[np.float64]


def prepare(trained: Trained, files: Sequence[Path]) -> Prepared:
    """Return an image as nnU-Net's preprocessor makes it.

    Parameters
    ----------
    trained : Trained
        The training.
    files : sequence of Path
        The channels in order.

    Raises
    ------
    DataError
        If a file cannot be read, or is damaged in a way that nnU-Net's reader does not notice.
    """
    for file in files:
        check_nifti(file)
    preprocessor = trained.configuration.preprocessor_class(verbose=False)
    with reading(files[0]):
        channels, properties = trained.plans.image_reader_writer_class().read_images([str(file) for file in files])
    data, _, properties = preprocessor.run_case_npy(
        channels, None, properties, trained.plans, trained.configuration, trained.dataset_json
    )
    return Prepared(torch.from_numpy(data), properties, channels[0])


@torch.no_grad()
def predict(trained: Trained, predictor: Any, image: Prepared) -> Prediction:
    """Return what a network says of an image, on the voxels of the image.

    As nnU-Net, logits are resampled to the image before they become classes.

    Parameters
    ----------
    trained : Trained
        The training.
    predictor : nnUNetPredictor
        Of the network, see `Trained.predictor`.
    image : Prepared
        The image.
    """
    logits = predictor.predict_logits_from_preprocessed_data(image.data).cpu()
    logits = on_image_grid(trained, logits, image.properties)
    uncertain = entropy(logits[None])[0].numpy()
    labels = trained.plans.get_label_manager(trained.dataset_json).convert_logits_to_segmentation(logits)
    expected = _probability_sums(logits)
    full = np.prod(image.properties["shape_before_cropping"])
    expected[0] += full - uncertain.size
    small = np.min_scalar_type(max(trained.classes))
    return Prediction(
        full_size(trained, labels.numpy().astype(small), image.properties),
        full_size(trained, uncertain, image.properties),
        expected,
    )


def on_image_grid(trained: Trained, maps: Tensor, properties: Mapping[str, Any]) -> Tensor:
    """Return maps (C, *S) of the network's grid on the voxels of the image, inside of nnU-Net's box.

    Parameters
    ----------
    trained : Trained
        The training.
    maps : Tensor, shape (C, *S)
        Logits or other maps, resampled as nnU-Net resamples logits.
    properties : mapping
        Of `Prepared`.
    """
    plans, configuration = trained.plans, trained.configuration
    shape = properties["shape_after_cropping_and_before_resampling"]
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    own = list(configuration.spacing)
    current = own if len(own) == len(shape) else [spacing[0], *own]
    return torch.as_tensor(configuration.resampling_fn_probabilities(maps.float(), shape, current, spacing))


def full_size(trained: Trained, inner: NDArray, properties: Mapping[str, Any]) -> NDArray:
    """Return an array of nnU-Net's box in the size and the axes of the image, 0 outside."""
    out = np.zeros(properties["shape_before_cropping"], inner.dtype)
    out[tuple(slice(*span) for span in properties["bbox_used_for_cropping"])] = inner
    return np.ascontiguousarray(out.transpose(trained.plans.transpose_backward))


def _probability_sums(logits: Tensor) -> NDArray[np.float64]:
    sums = torch.zeros(len(logits), dtype=torch.float64)
    for _, block in voxel_blocks(logits[None]):
        sums += torch.softmax(widen(block), 0).sum(1)
    return sums.numpy()


def write_map(path: Path, values: NDArray, properties: Mapping[str, Any]) -> None:
    """Write a map of numbers as NIfTI in the place of its image, whole or not at all.

    Parameters
    ----------
    path : Path
        The file, in .nii.gz.
    values : array, shape (Z, Y, X)
        On the voxels of the image as nnU-Net's reader sees it.
    properties : mapping
        Of `Prepared`: what nnU-Net's reader says of the place. Of formats without one only the spacing is written.
    """
    with whole_file(path) as part:
        if "nibabel_stuff" in properties:
            known = properties["nibabel_stuff"]
            affine = known.get("reoriented_affine", known["original_affine"])
            nib.save(nib.Nifti1Image(values.T, affine), part)
            return
        known = properties.get("sitk_stuff")
        flat = known is not None and len(known["spacing"]) == 2
        image = sitk.GetImageFromArray(values[0] if flat else values)
        if known is None:
            image.SetSpacing([float(step) for step in reversed(properties["spacing"])])
        else:
            image.SetSpacing(known["spacing"])
            image.SetOrigin(known["origin"])
            image.SetDirection(known["direction"])
        sitk.WriteImage(image, str(part))


def write_labels(trained: Trained, path: Path, labels: NDArray, properties: Mapping[str, Any]) -> None:
    """Write a predicted label map by the data set's writer, as nnUNetv2_predict does, whole or not at all."""
    with whole_file(path) as part:
        trained.plans.image_reader_writer_class().write_seg(labels, str(part), properties)


class BottleneckMean:
    """Mean of the encoder's last features over all patches of an image, (F,): what an image is like.

    Parameters
    ----------
    network : nn.Module
        A network of nnU-Net with `encoder.stages`.
    """

    def __init__(self, network: Any) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._handle: Any = network.encoder.stages[-1].register_forward_hook(self._add)

    def _add(self, module: Any, inputs: Any, output: Tensor) -> None:
        with torch.no_grad():
            mean = output.float().flatten(2).mean((0, 2)).cpu()
        self._sum = mean if self._sum is None else self._sum + mean
        self._count += 1

    def take(self) -> NDArray[np.float32]:
        """Return the mean since the last call, and forget it."""
        if self._sum is None:
            raise RuntimeError("the network was not run since the last take()")
        mean, self._sum, self._count = self._sum / self._count, None, 0
        return mean.numpy()

    def close(self) -> None:
        """Take the hook off the network."""
        self._handle.remove()
