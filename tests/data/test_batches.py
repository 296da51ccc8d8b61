"""The arrays of a batch hold the conversations."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_jax.data.batches import RowShape, empty_batch, expand, place
from ross_jax.data.conversation import EncodedConversation
from ross_jax.data.packing import Location, PackingConfig

X = -100
P = -200


def encoded(ids, labels) -> EncodedConversation:
    return EncodedConversation(np.array(ids, np.int32), np.array(labels, np.int32))


def test_expand_an_example():
    result = expand(encoded([11, P, 12, 13, P, 14], [X, X, 12, X, X, 14]), image_tokens=3)
    assert result.tokens.tolist() == [11, 0, 0, 0, 12, 13, 0, 0, 0, 14]
    # The last position of an image predicts the text that follows it.
    assert result.targets.tolist() == [X, X, X, 12, X, X, X, X, 14, X]
    assert result.image_start.tolist() == [1, 6]
    assert result.supervised == 2
    assert {array.dtype for array in result} == {np.dtype(np.int32)}


def test_the_first_label_is_no_target():
    result = expand(encoded([5, 6], [5, 6]), 3)
    assert result.targets.tolist() == [6, X] and result.supervised == 1


CONVERSATIONS = st.lists(st.tuples(st.sampled_from([P, 3, 4, 5]), st.booleans()), min_size=1, max_size=12).map(
    lambda items: encoded([i for i, _ in items], [i if s and i != P else X for i, s in items])
)


def slow_expand(conversation, image_tokens):
    """(token, label, whether an image starts) of each position, one at a time."""
    result = []
    for token, label in zip(conversation.input_ids.tolist(), conversation.labels.tolist(), strict=True):
        if token == P:
            result += [(0, X, k == 0) for k in range(image_tokens)]
        else:
            result.append((token, label, False))
    return result


@settings(max_examples=150, deadline=None)
@given(
    CONVERSATIONS,
    st.integers(1, 4),
    st.builds(PackingConfig, st.integers(1, 20), st.integers(0, 3), st.none() | st.integers(1, 4)),
)
def test_expand_and_truncate_by_definition(conversation, image_tokens, limits):
    whole = slow_expand(conversation, image_tokens)
    result = expand(conversation, image_tokens)
    assert result.tokens.tolist() == [item[0] for item in whole]
    assert result.targets.tolist() == [item[1] for item in whole[1:]] + [X]
    assert result.image_start.tolist() == [i for i, item in enumerate(whole) if item[2]]

    cut = expand(conversation, image_tokens, limits)
    end = len(cut.tokens)
    assert cut.tokens.tolist() == result.tokens[:end].tolist()
    assert cut.targets.tolist() == ([*result.targets[: end - 1].tolist(), X] if end else [])
    assert end <= limits.length and len(cut.image_start) <= limits.images
    assert limits.supervised is None or cut.supervised <= limits.supervised
    assert all(start + image_tokens <= end for start in cut.image_start)
    if end < len(whole):  # the next token or image would exceed a limit
        longer = whole[: end + (image_tokens if whole[end][2] else 1)]
        assert (
            len(longer) > limits.length
            or sum(item[2] for item in longer) > limits.images
            or (limits.supervised is not None and sum(i[1] != X for i in longer[1:]) > limits.supervised)
        )


SHAPE = RowShape(length=12, images=3, image_tokens=3, image_size=2)


def image(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value, np.uint8)


def example(broken: bool):
    batch = empty_batch(2, SHAPE)
    one = expand(encoded([11, P, 12], [X, X, 12]), 3)
    two = expand(encoded([P, 21, 22], [X, 21, 22]), 3)
    if not broken:
        place(batch, 1, Location(start=0, slot=0, segment=1, first_image_id=70), one, [image(1)])
    place(batch, 1, Location(start=5, slot=1, segment=2, first_image_id=80), two, [image(2)])
    return batch


def test_place_an_example():
    batch = example(broken=False)
    assert batch["tokens"][1].tolist() == [11, 0, 0, 0, 12, 0, 0, 0, 21, 22, 0, 0]
    assert batch["targets"][1].tolist() == [X, X, X, 12, X, X, X, 21, 22, X, X, X]
    assert batch["positions"][1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0]
    assert batch["segments"][1].tolist() == [1] * 5 + [2] * 5 + [0, 0]
    assert batch["image_start"][1].tolist() == [1, 5, 12]
    assert batch["image_ids"][1].tolist() == [70, 80, 0]
    assert batch["images"][1, :, 0, 0, 0].tolist() == [1, 2, 0]
    for name, value in empty_batch(1, SHAPE).items():
        np.testing.assert_array_equal(batch[name][0], value[0])


def test_dtypes_and_shapes():
    batch = example(broken=False)
    shapes = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert shapes == {
        "tokens": ("int32", (2, 12)),
        "targets": ("int32", (2, 12)),
        "positions": ("int32", (2, 12)),
        "segments": ("int32", (2, 12)),
        "images": ("uint8", (2, 3, 2, 2, 3)),
        "image_start": ("int32", (2, 3)),
        "image_ids": ("uint32", (2, 3)),
    }


def test_a_broken_conversation_moves_nothing():
    whole, broken = example(broken=False), example(broken=True)
    for name in ("tokens", "targets", "positions", "segments"):
        np.testing.assert_array_equal(broken[name][1, 5:], whole[name][1, 5:])
    assert broken["segments"][1, :5].tolist() == [0] * 5
    assert (broken["targets"][1, :5] == X).all()
    assert broken["image_start"][1].tolist() == [12, 5, 12]
    assert broken["image_ids"][1].tolist() == [0, 80, 0]
    assert broken["images"][1, :, 0, 0, 0].tolist() == [0, 2, 0]
