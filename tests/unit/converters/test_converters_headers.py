"""Collections are converted as nnU-Net's reader of the new data set sees their files."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from tests.collections import oblique
from tests.converting import A_LABEL, FORMS, NIFTI_LABELS, find, lay_out, read, refused, run

ELSEWHERE = oblique((3, 3, 3), (500, 500, 500))
BRATS = ("**/BraTS19_CBICA_ASA_1_flair.nii", "**/BraTS19_CBICA_ASA_1_seg.nii")


def change(path, *, qform=None, sform=None, values=None, slope=1.0) -> None:
    """Write a NIfTI file anew with other codes and places."""
    image = nib.load(path, mmap=False)
    array = np.asanyarray(image.dataobj) if values is None else values
    new = nib.Nifti1Image(np.rint(array / slope).astype(array.dtype), None, image.header)
    for put, place in ((new.set_qform, qform), (new.set_sform, sform)):
        if place is not None:
            put(*place)
    new.header.set_slope_inter(slope, 0)
    nib.save(new, path)


@pytest.mark.parametrize("name", NIFTI_LABELS)
def test_label_maps_of_whole_numbers_with_a_scale_are_converted(raw, source, name) -> None:
    lay_out(name, source)
    change(path := find(source, A_LABEL[name]), slope=0.1)
    assert nib.load(path).get_fdata().max() % 1 != 0  # 1.0000000149, not 1
    run(FORMS[name], source)


def test_label_maps_of_plain_files_with_a_scale_are_converted(raw, source) -> None:
    lay_out("brats-flat-nii", source)
    path = find(source, BRATS[1])
    before = np.asanyarray(nib.load(path, mmap=False).dataobj) > 0
    change(path, slope=0.1)
    run(FORMS["brats-flat-nii"], source)
    (written,) = raw.rglob("BraTS19_CBICA_ASA_1.nii")
    assert np.array_equal(read(written)[0] > 0, before)


@pytest.mark.parametrize(("name", "agree"), [("brats-flat-nii", "sform"), ("brats-grades", "qform")])
@pytest.mark.parametrize("of_both", ["sform", "qform"])
def test_image_and_label_are_on_one_grid_if_nnunets_reader_sees_them_on_one(raw, source, name, agree, of_both) -> None:
    """SimpleITK, for `.nii.gz`, goes by a qform beside an sform that is not the scanner's; nibabel by the sform."""
    lay_out(name, source)
    image, label = (find(source, pattern + FORMS[name].ending.removeprefix(".nii")) for pattern in BRATS)
    here, there = nib.load(image).affine, oblique((1, 1, 1), (-20, 30, 40), 50)
    change(image, qform=(here, 1), sform=(there, 2))
    if of_both == "qform":
        change(label, qform=(here, 1), sform=(ELSEWHERE, 2))
    else:
        change(label, qform=(ELSEWHERE, 1), sform=(there, 2))
    if agree == of_both:
        run(FORMS[name], source)
    else:
        refused(raw, FORMS[name], source, str(label), "different grids")


def test_a_label_is_where_its_image_is_to_every_reader(raw, source) -> None:
    """A label that was drawn by a program with ITK has the qform of its image alone."""
    lay_out("brats-grades", source)
    image, label = (find(source, pattern + ".gz") for pattern in BRATS)
    here = nib.load(image).affine
    change(image, qform=(here, 1), sform=(ELSEWHERE, 2))
    drawn = sitk.GetImageFromArray(sitk.GetArrayFromImage(sitk.ReadImage(str(label))))
    drawn.CopyInformation(sitk.ReadImage(str(image)))
    sitk.WriteImage(drawn, str(label))
    run(FORMS["brats-grades"], source)
    images, labels = ([*raw.rglob(f"{folder}/*CBICA_ASA_1*")] for folder in ("imagesTr", "labelsTr"))
    assert np.array_equal(read(images[0])[1], read(labels[0])[1])
    assert np.array_equal(nib.load(images[0]).affine, nib.load(labels[0]).affine)


def test_an_image_that_nnunets_reader_refuses_is_named(raw, source) -> None:
    lay_out("brats-grades", source)
    path = find(source, BRATS[0] + ".gz")
    sheared = nib.load(path).affine.copy()
    sheared[0, 1] += 0.3
    change(path, qform=(None, 0), sform=(sheared, 2))
    refused(raw, FORMS["brats-grades"], source, str(path), "right angles", "resample it")
