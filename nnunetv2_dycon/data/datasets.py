"""Names and ids of data sets."""

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_dycon.errors import DataError


def dataset_number(name: str) -> int:
    """Return the id in a full name.

    Examples
    --------
    >>> dataset_number("Dataset004_Hippocampus")
    4
    """
    return int(name[len("Dataset") :][:3])


def dataset_name(dataset: int | str) -> str:
    """Return the full name of the data set with this id or name in any of nnU-Net's three folders.

    Raises
    ------
    DataError
        If no data set has it, or several do.
    """
    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        raise DataError(f"-d {dataset}: {reason}; check the id, nnUNet_raw and nnUNet_preprocessed") from error
