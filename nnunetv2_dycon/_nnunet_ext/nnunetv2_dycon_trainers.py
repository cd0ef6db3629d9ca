"""The only file in the folder that nnU-Net's trainer search scans.

The search imports this file anew each time and forgets it afterwards, so nothing is defined here: classes
come from the installed package, where they are made once and can be pickled.
"""

try:
    from nnunetv2_dycon.trainers.messages import end_in_one_line
    from nnunetv2_dycon.trainers.names import trainer_class
except ModuleNotFoundError as error:
    if error.name == "nnunetv2_dycon":  # the folder list was inherited by an environment without the package:
        error.name = __name__  # under this name nnU-Net 2.8 skips the file, and its search goes on
    raise

end_in_one_line()


def __getattr__(name: str) -> type:
    """Return the trainer class called `name`; AttributeError for every name that is not ours."""
    return trainer_class(name)
