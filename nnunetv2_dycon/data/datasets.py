"""Which data set a user means."""

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_dycon.errors import DataError


def dataset_name(dataset: int | str) -> str:
    """Return the full name of a data set, from its id or name, as nnU-Net finds it in its three folders.

    Raises
    ------
    DataError
        If there is none, or several.
    """
    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        raise DataError(f"-d {dataset}: {reason}; check the id, nnUNet_raw and nnUNet_preprocessed") from error
