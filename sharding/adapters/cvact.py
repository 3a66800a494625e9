"""Read CVACT's raw folder: one panorama and one tile a place, densely over Canberra.

::

    ACT_data.mat (or within ANU_data_small)                        MATLAB 5; indexes into panoIds count from 1:
        panoIds, utm                                               ids, and each one's easting and northing in metres
        trainSet.trainInd, valSet.valInd                           of the training and the validation pairs
        valSetAll.valInd                                           of the test set, ten times as large
    ANU_data_small/streetview/<id>_grdView.jpg                     panoramas of training and validation
    ANU_data_small/satview_polish/<id>_satView_polish.jpg          their tiles
    ANU_data_test/…                                                the same of the test set

Source of the layout: Liu, Li, Lending Orientation to Neural Networks for Cross-view Geo-localization, CVPR 2019 (code:
OriCNN), which counts as found what lies within 5 metres of the test query; Sample4Geo, which asks for the very pair.
Hence both protocols, and Sample4Geo's sizes: panoramas squeezed to the aspect of CVUSA's, 224 to 1232.

The .mat says what belongs to the test set; where it has no ``valSetAll``, all that lies in ANU_data_test does. Training
is the same for both protocols. All is one area.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from geostream.errors import BadInput, MissingRaw
from sharding.adapters.raw_files import FolderIndex, find_root, first_located, list_folder, located, readable_name
from sharding.places import IMAGE_SUFFIX, Place, RawDataset, View, assign_keys, repeats
from sharding.raw_path import RawPath

TILE_SIZE = (384, 384)
VIEW_SIZE = (140, 768)
MAT = "ACT_data.mat"
TRAINING = ("ANU_data_small", "trainSet", "trainInd")  # folder, and the set of indexes in the .mat
PROTOCOLS = {"val": ("ANU_data_small", "valSet", "valInd"), "test": ("ANU_data_test", "valSetAll", "valInd")}
PANORAMAS, PANORAMA = "streetview", "_grdView"
TILES, TILE = "satview_polish", "_satView_polish"
VARIABLES = ("panoIds", "utm", "trainSet", "valSet", "valSetAll")
AREA = "Canberra"
Named = dict[str, str]  # ids, and where each was named
Position = tuple[float, float]  # north, east


def read_places(raw: RawPath, *, protocol: str = "val") -> RawDataset:
    """Read a CVACT folder.

    Args:
        raw: the folder.
        protocol: which pairs are the test split: "val", or the ten times as large "test".

    Returns:
        Its places. Missing images are marked, not refused.

    Raises:
        BadInput: the .mat is malformed.
        MissingRaw: the .mat or a folder is missing.
    """
    raw = find_root(raw, "CVACT's ACT_data.mat and ANU_data_small", (TRAINING[0], PROTOCOLS["test"][0]))
    if protocol not in PROTOCOLS:
        raise BadInput(f"protocol {protocol!r}: CVACT has {' and '.join(PROTOCOLS)}")
    nested = (f"{folder}/{MAT}" for folder, *_ in PROTOCOLS.values())
    mat = _Mat(first_located(raw, (MAT, *nested)) or raw / MAT)
    train, repeated = mat.named(*TRAINING[1:])
    folder, *indexes = PROTOCOLS[protocol]
    notes: list[str] = []
    if protocol == "test" and indexes[0] not in mat.content:
        test, again = _found(located(raw, folder)), 0
        notes.append(f"{MAT} has no {indexes[0]}: the test set is what lies in {folder}")
    else:
        test, again = mat.named(*indexes)
    if both := sorted(train.keys() & test.keys()):
        one = both[0]
        raise BadInput(f"{train[one]}: {one} is for training, and for the {protocol} set, too ({test[one]}); keep one")
    keys = assign_keys((AREA, one) for one in (*train, *test))
    positions = mat.positions()
    places = []
    for split, inside, ids in (("train", TRAINING[0], train), ("test", folder, test)):
        panoramas, tiles = (FolderIndex(raw, located(raw, f"{inside}/{kind}")) for kind in (PANORAMAS, TILES))
        for one, where in ids.items():
            at = positions.get(one, (math.nan, math.nan))
            view = View(panoramas.find(f"{one}{PANORAMA}.jpg", where), split, *at)
            tile = tiles.find(f"{one}{TILE}.jpg", where)
            places.append(Place(keys[AREA, one], AREA, (split,), tile, *at, (view,)))
    without = sum(math.isnan(place.north) for place in places)
    if without:
        notes.append(f"{MAT} has no coordinates of {without} of {len(places)} pairs")
    has_positions = without < len(places)
    return RawDataset(
        adapter="cvact",
        root=raw,
        options={"protocol": protocol},
        coordinates="utm" if has_positions else "none",
        tile_size=TILE_SIZE,
        view_size=VIEW_SIZE,
        places=tuple(places),
        notes=(*repeats(repeated + again), *notes),
        protocols=("paired", "within-5m") if protocol == "test" and has_positions else ("paired",),
    )


def _found(folder: RawPath) -> Named:
    """Return the ids of which a panorama or a tile lies in ``folder``."""
    found: Named = {}
    for kind, ending in ((PANORAMAS, PANORAMA), (TILES, TILE)):
        for entry in list_folder(located(folder, kind)):
            name = readable_name(entry)
            stem = IMAGE_SUFFIX.sub("", name)
            if stem != name and stem.endswith(ending):
                found.setdefault(stem.removesuffix(ending), f"{folder.name}/{kind}")
    return found


class _Mat:
    """Read the .mat; check what it says as it is asked for."""

    def __init__(self, path: RawPath) -> None:
        from scipy.io import loadmat  # not above: every process that encodes would spend 0.4 s on it

        self.path = path
        try:
            data = io.BytesIO(path.read_bytes())
        except OSError as error:
            raise MissingRaw(f"{path}: cannot read it ({error.strerror}); is the raw folder complete?") from error
        try:
            self.content: dict[str, Any] = loadmat(data, variable_names=VARIABLES)
        except NotImplementedError as error:
            raise BadInput(f"{path}: in the format of MATLAB 7.3; save it with -v7, or restore CVACT's own") from error
        except Exception as error:  # scipy raises whatever a damaged file leads it into
            raise BadInput(f"{path}: not a whole MATLAB file ({' '.join(str(error).split())[:200]})") from error
        self.ids = [_text(one) for one in np.asarray(self._variable("panoIds")).ravel()]

    def _variable(self, name: str) -> Any:
        if name not in self.content:
            raise BadInput(f"{self.path}: has no {name}; restore CVACT's own file")
        return self.content[name]

    def named(self, name: str, field: str) -> tuple[Named, int]:
        """Return the ids at the indexes ``name.field``, and how many of these repeat an earlier one."""
        struct = self._variable(name)
        if not (getattr(struct, "dtype", None) is not None and field in (struct.dtype.names or ()) and struct.size):
            raise BadInput(f"{self.path}: {name} has no field {field}; restore CVACT's own file")
        indexes = np.asarray(struct[field].ravel()[0]).ravel()
        if indexes.dtype.kind not in "iuf":
            raise BadInput(f"{self.path}: {name}.{field} holds no numbers; restore CVACT's own file")
        if not (known := np.isin(indexes, np.arange(len(self.ids)) + 1)).all():
            wrong = f"names {indexes[~known][0]}, but panoIds are numbered 1 to {len(self.ids)}"
            raise BadInput(f"{self.path}: {name}.{field} {wrong}; restore CVACT's own file")
        found: Named = {}
        for index in indexes.astype(np.int64).tolist():
            found.setdefault(self.ids[index - 1], f"{MAT}:panoIds({index})")
        return found, len(indexes) - len(found)

    def positions(self) -> dict[str, Position]:
        """Return north and east of each id, as far as they are known."""
        if "utm" not in self.content:
            return {}
        utm = np.asarray(self.content["utm"])
        if utm.shape != (len(self.ids), 2) or utm.dtype.kind not in "iuf":
            raise BadInput(f"{self.path}: utm is of shape {utm.shape}, not {(len(self.ids), 2)}; restore CVACT's own")
        rows = zip(self.ids, utm.astype(np.float64).tolist(), strict=True)
        # Of an id that is there twice the first, as its first index is the one it is named by.
        return {one: (north, east) for one, (east, north) in [*rows][::-1] if math.isfinite(north + east)}


def _text(value: Any) -> str:
    """Return an id: a row of a matrix of characters, or the content of a cell."""
    inside: npt.NDArray[Any] = np.asarray(value).ravel()
    return str(inside[0]).strip() if inside.size else ""
