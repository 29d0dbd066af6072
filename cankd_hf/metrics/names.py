"""Names of the scores of single classes."""

from collections.abc import Collection, Mapping


def class_keys(prefix: str, id2label: Mapping[int, str], taken: Collection[str] = ()) -> dict[int, str]:
    """The name of each class's score, `PREFIX_NAME`, in the order of the classes.

    Names that two classes share, or that another score has (`taken`), get the number of the class, as in
    `ap_small_class_2`; so do classes without a name.
    """
    plain = {index: f"{prefix}_{name}" for index, name in sorted(id2label.items())}
    names = list(plain.values())
    shared = {key for key in names if key in taken or names.count(key) > 1 or key == f"{prefix}_"}
    used = {*taken, *names}
    keys: dict[int, str] = {}
    for index, key in plain.items():
        keys[index] = key
        while key in shared and keys[index] in used:
            keys[index] += f"_class_{index}"
        used.add(keys[index])
    return keys
