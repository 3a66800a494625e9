"""Choose the index that was made with a promoted model."""

from __future__ import annotations

from geostream.errors import BadInput
from geostream.layout.listing import the_dataset
from geostream.runs.inventory import INDEX_FILE, index_names, indexes_folder
from geostream.runs.models import find_model
from geostream.store import Store


def index_of_model(store: Store, dataset: str | None, model: str, index: str | None) -> str:
    """Return the name of the index whose vectors a promoted model has made.

    Weights are compared, not numbers: the index may have been made before its model was promoted.

    Args:
        store: The root of the store.
        dataset: The data set's name; None for the only one in the store.
        model: "current", or a model's number.
        index: The index that was asked for; None for any.

    Raises:
        BadInput: There is no such model, it has no index, or it has several and none was asked for.
    """
    dataset = the_dataset(store, dataset)
    wanted, folder = find_model(store, dataset, model), indexes_folder(store, dataset)
    names = index_names(folder)
    made = [name for name in names if folder.read_json(f"{name}/{INDEX_FILE}")["model"]["crc32c"] == wanted.crc32c]
    if index is not None:
        made = [name for name in made if name == index]
    if len(made) == 1:
        return made[0]
    where = f"{folder.url}: model {wanted.number}"
    if made:
        raise BadInput(f"{where} has several indexes; say which with --index (there: {', '.join(made)})")
    what = f"has not made the index {index}" if index in names else "has no index"
    raise BadInput(f"{where} {what}; make one: geostream index {store.url} --model {wanted.number}")
