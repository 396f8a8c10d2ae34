"""warm, stats, verify, why, gc on a tiny source."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from models.encoders import hf
from models.encoders.hf import HFEncoder
from services.contracts import FeatureRequest, ImageRef, Intrinsics, Split, Tensor, View
from services.data.digests import Digester, content_digest
from services.errors import ConfigError, DataError
from services.features import maintain
from services.features.encode import build_encoder
from services.features.keys import feature_key
from services.features.sink import StoreSink, open_store
from services.features.text_table import text_table
from services.features.why import why


class Source:
    """As much of a manifest as these functions read: two scenes, the last of another split."""

    def __init__(self, requests):
        self.requests = requests
        parts = (("s0", Split.TRAIN, requests[:3]), ("s1", Split.VAL, requests[3:5]))
        self.entries = [
            SimpleNamespace(
                id=name, kind="scene", split=split, n_views=len(part), digests=tuple(r.digests[0] for r in part)
            )
            for name, split, part in parts
        ]

    def __len__(self):
        return 2

    def __contains__(self, item):
        return item in ("s0", "s1")

    def entry(self, item):
        return self.entries[int(item[1])]

    def views(self, item, places):
        part = self.requests[:3] if item == "s0" else self.requests[3:5]
        camera = Intrinsics(fx=1, fy=1, cx=0, cy=0, width=80, height=60)
        return [View(image=part[place].images[0], K=camera) for place in places]

    def digests(self, item, places):
        return [self.entry(item).digests[place] for place in places]


@pytest.fixture
def source(make_requests):
    return Source(make_requests(5))


def test_warm_encodes_what_is_missing_and_goes_on_where_it_stopped(make_config, source):
    config, seen = make_config(), []
    with open_store(config) as store:
        part = maintain.warm(config, store, "tiny", source, splits=["train"])
        assert (part.inputs, part.stored, part.encoded) == (3, 0, 3)
    with open_store(config) as store:
        rest = maintain.warm(config, store, "tiny", source, progress=lambda done, of: seen.append((done, of)))
        assert (rest.inputs, rest.stored, rest.encoded) == (5, 3, 2)
        assert seen[-1] == (5, 5)
        assert "already stored  3" in str(rest)


def test_warm_names_what_is_broken_and_encodes_the_rest(make_config, source, tmp_path):
    config = make_config()
    (tmp_path / "a1.png").write_bytes(b"nothing")
    with open_store(config) as store:
        report = maintain.warm(config, store, "tiny", source)
    assert report.encoded == 4
    assert list(report.broken) == ["tiny/s0"]
    assert "a1.png" in report.broken["tiny/s0"]


def test_stats_says_whose_a_fingerprint_is(make_config, source):
    config = make_config()
    older = dataclasses.replace(config, encoders={"features": dataclasses.replace(config.encoders["features"], seed=7)})
    with open_store(config) as store:
        maintain.warm(config, store, "tiny", source)
        maintain.warm(older, store, "tiny", source, splits=["val"])
        report = maintain.stats(config, store)
    by_records = {row.records: row for row in report.rows}
    assert by_records[5].encoders == ("features",)
    assert by_records[2].encoders == ()
    assert by_records[5].model == "Dinov2Model"
    assert "features" in str(report)
    with open_store(make_config(cache={"root": config.storage.root + "/other"})) as empty:
        assert str(maintain.stats(config, empty)) == "the cache is empty"


def test_verify_finds_no_drift_and_says_which_inputs_changed(make_config, source, tmp_path):
    config = make_config()
    with open_store(config) as store:
        maintain.warm(config, store, "tiny", source)
        report = maintain.verify(config, store, sample=5)
        assert report.ok
        assert report.checked == 5
        assert {drift.differing for drift in report.drift.values()} == {0}
        Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(tmp_path / "a2.png")
        again = maintain.verify(config, store, sample=5)
    assert (again.checked, again.changed) == (4, ("tiny/s0",))
    assert "changed since" in str(again)


def test_verify_finds_drift(make_config, source, monkeypatch):
    config = make_config()
    real = HFEncoder.encode

    def drifted(self, inputs):
        outputs = real(self, inputs)
        return {name: value.flip(-1) if name == "tokens" else value for name, value in outputs.items()}

    with open_store(config) as store:
        maintain.warm(config, store, "tiny", source)
        monkeypatch.setattr(HFEncoder, "encode", drifted)
        report = maintain.verify(config, store, sample=3)
    assert not report.ok
    assert report.drift["tokens"].differing == 3
    assert report.drift["tokens"].cosine_error > 0.1
    assert report.drift["summary"].cosine_error == 0
    assert "DRIFT" in str(report)


def test_weights_that_change_in_their_folder(make_config, source, tmp_path, monkeypatch):
    """They are another encoder, whose features are not there; were their digest blind, verify would find the drift."""

    def save(seed):
        settings = make_config().encoders["features"]
        model = build_encoder("features", make_config(encoder={"seed": seed})).model
        model.save_pretrained(tmp_path / "weights")
        return dataclasses.replace(settings, arch={}, weights=str(tmp_path / "weights"))

    config = dataclasses.replace(make_config(), encoders={"features": save(0)})
    blind = hf.stored_digest(tmp_path / "weights")
    with open_store(config) as store:
        maintain.warm(config, store, "tiny", source)
        assert maintain.verify(config, store).ok
        save(1)
        assert maintain.verify(config, store).checked == 0
        (reason, *_) = why(config, store, {"tiny": source}, "tiny/s0:0").reasons
        assert [difference.part for difference in reason.differences] == ["identity.weights"]
        assert reason.differences[0].nearest == blind
        monkeypatch.setattr(hf, "stored_digest", lambda _: blind)
        report = maintain.verify(config, store)
    assert not report.ok
    assert {drift.differing for drift in report.drift.values()} == {report.checked} == {5}


def test_verify_of_nothing_is_not_ok(make_config):
    config = make_config()
    with open_store(config) as store:
        report = maintain.verify(config, store)
    assert not report.ok
    assert "nothing could be checked" in str(report)


def test_why_names_what_differs(make_config, source):
    config = make_config()
    with open_store(config) as store:
        manifests = {"tiny": source}
        never = why(config, store, manifests, "tiny/s1:0")
        assert "never encoded" in never.reasons[0].reason
        maintain.warm(config, store, "tiny", source, splits=["train"])
        assert why(config, store, manifests, "tiny/s0#4").stored

        changed = dataclasses.replace(
            config, encoders={"features": dataclasses.replace(config.encoders["features"], height=42)}
        )
        other = why(changed, store, manifests, "tiny/s0:1")
        parts = {d.part: (d.wanted, d.nearest) for d in other.reasons[0].differences}
        assert parts["identity.preprocessing.height"] == ("42", "56")
        assert set(parts) == {"identity.preprocessing.height", "identity.padding"}
        assert "identity.preprocessing.height" in str(other)

        edited = Source(source.requests)
        edited.entries[0].digests = ("0" * 64, *edited.entries[0].digests[1:])
        touched = why(config, store, {"tiny": edited}, "tiny/s0:0")
        (difference,) = touched.reasons[0].differences
        assert difference.part == "image 0 content"
        assert difference.wanted == "0" * 64


def test_why_of_an_evicted_record_says_so(make_config, source):
    config = make_config()
    with open_store(config) as store:
        maintain.warm(config, store, "tiny", source)
        folder = StoreSink(config, store).namespace("features").folder
    for path in [*folder.glob("*.idx"), *folder.glob("*.arrow"), *(folder / "index").iterdir()]:
        path.unlink()
    with open_store(config) as store:
        report = why(config, store, {"tiny": source}, "tiny/s0:0")
    assert "lost, evicted or never committed" in report.reasons[0].reason


@pytest.mark.parametrize(
    ("sample", "message"),
    [("nowhere/s0", "no source 'nowhere'"), ("tiny/s9", "no item 's9'"), ("tiny/s0:5", "views 0 to 2")],
)
def test_why_of_an_unknown_sample_is_refused(sample, message, make_config, source):
    config = make_config()
    with open_store(config) as store, pytest.raises(DataError, match=message):
        why(config, store, {"tiny": source}, sample)


def test_gc_keeps_by_the_name_of_an_encoder(make_config, source):
    config = make_config()
    older = dataclasses.replace(config, encoders={"features": dataclasses.replace(config.encoders["features"], seed=7)})
    with open_store(config) as store:
        maintain.warm(config, store, "tiny", source)
        maintain.warm(older, store, "tiny", source)
        report = maintain.gc(config, store, keep=["features"])
        assert len(report.removed.fingerprints) == 1
        assert report.removed.nbytes > 0
        assert "shards removed" in str(report)
        (left,) = maintain.stats(config, store).rows
    assert left.encoders == ("features",)


def test_what_only_a_plan_knows_is_not_warmed(make_config, source):
    config = make_config()
    texts = dataclasses.replace(config.encoders["features"], family="clip_text")
    config = dataclasses.replace(config, encoders={"features": texts})
    with open_store(config) as store, pytest.raises(ConfigError, match="only a run's plan knows"):
        maintain.warm(config, store, "tiny", source)


def test_comparison_knows_bfloat16():
    one = {"x": Tensor(data=np.array([[0x3F80, 0x4000]], np.int16), dtype="bfloat16")}  # 1, 2
    two = {"x": Tensor(data=np.array([[0x3F80, 0x4040]], np.int16), dtype="bfloat16")}  # 1, 3
    drift: dict = {}
    maintain._compare(one, two, drift)
    assert drift["x"].max_abs == 1.0
    assert drift["x"].cosine_error == pytest.approx(1 - 7 / np.sqrt(50), abs=1e-6)


def test_tables_align():
    assert text_table(("name", "n"), [("a", 1), ("long", 22)]) == "name   n\na      1\nlong  22"


def test_a_picture_in_an_archive_is_compared_by_its_own_content(tmp_path):
    archive = tmp_path / "pictures.tar"
    ref = ImageRef(path=str(archive), member="b.png")

    def write(first: bytes, second: bytes) -> None:
        with tarfile.open(archive, "w") as tar:
            for name, content in (("a.png", first), ("b.png", second)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    write(b"one", b"two")
    digest = content_digest(ref)
    request = FeatureRequest(
        key=feature_key([digest]), encoder="features", sample_id="s", images=(ref,), digests=(digest,)
    )
    write(b"another", b"two")
    assert maintain._unchanged(request, Digester())
    write(b"another", b"tow")
    assert not maintain._unchanged(request, Digester())
    archive.unlink()
    assert not maintain._unchanged(request, Digester())
