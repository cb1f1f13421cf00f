"""Weights and inputs of the parity tests, from names and shapes alone, equal in every environment.

Only numpy: LAVIS's environment and ours both import this file.
"""

import zlib

import numpy as np

IMAGE_SIZE, PATCH_SIZE = 28, 14
VISION_WIDTH, NUM_PATCHES = 12, 5
HIDDEN, LAYERS, HEADS, INTERMEDIATE, VOCAB, POSITIONS = 16, 2, 2, 24, 30, 12
QUERIES, FEATURES = 3, 8
PAD, CLS, SEP, BOS, ENC = 0, 1, 2, 28, 29
OPT_PAD, OPT_VOCAB = 1, 26
PAIRS, TOKENS = 3, 7  # of each rank
QUEUE_SIZE = 12
PROMPT_TOKENS = 2  # of a caption's prompt


def make_array(name: str, shape: tuple[int, ...], scale: float = 0.3) -> np.ndarray:
    """Make normal numbers that depend on the name only; RandomState's stream never changes."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * scale


def make_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Make a parameter by its name in LAVIS; scales of layer norms are near 1."""
    value = make_array(name, shape)
    return (
        1 + 0.3 * value
        if "LayerNorm.weight" in name or "layer_norm.weight" in name or name == "ln_vision.weight" or ".norm" in name
        else value
    )


def make_texts(rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Make token ids and mask of a rank's texts, [PAIRS, TOKENS] each, of different lengths."""
    rng = np.random.RandomState(100 + rank)
    ids = rng.randint(3, BOS, (PAIRS, TOKENS))
    mask = np.ones((PAIRS, TOKENS), dtype=np.int64)
    ids[:, 0] = CLS
    for row, length in enumerate((TOKENS, 4, 5)[(rank + i) % 3] for i in range(PAIRS)):
        ids[row, length - 1], ids[row, length:], mask[row, length:] = SEP, PAD, 0
    return ids, mask


def make_opt_config() -> dict:
    """Make the settings of a tiny OPT."""
    return {
        "vocab_size": OPT_VOCAB,
        "hidden_size": 20,
        "word_embed_proj_dim": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "max_position_embeddings": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": OPT_PAD,
    }


def make_opt_texts() -> tuple[np.ndarray, np.ndarray]:
    """Make token ids and mask of captions for the language model, [PAIRS, TOKENS] each."""
    ids = np.random.RandomState(7).randint(3, OPT_VOCAB - 1, (PAIRS, TOKENS))
    mask = np.ones((PAIRS, TOKENS), dtype=np.int64)
    ids[:, 0] = 2
    for row, length in enumerate((TOKENS, 4, 5)):
        ids[row, length:], mask[row, length:] = OPT_PAD, 0
    return ids, mask


def make_images(rank: int) -> np.ndarray:
    """Make the features of a rank's images, [PAIRS, NUM_PATCHES, VISION_WIDTH]."""
    return make_array(f"images of rank {rank}", (PAIRS, NUM_PATCHES, VISION_WIDTH), 1.0)


def make_pixels() -> np.ndarray:
    """Make the pixels of two images, [2, 3, IMAGE_SIZE, IMAGE_SIZE]."""
    return make_array("pixels", (2, 3, IMAGE_SIZE, IMAGE_SIZE), 1.0)


def make_negatives(rank: int, world_size: int) -> tuple[list[int], list[int]]:
    """Make the columns of the negative images and of the negative texts of a rank's pairs."""
    num_pairs = world_size * PAIRS
    first = rank * PAIRS
    return [(first + b + 1) % num_pairs for b in range(PAIRS)], [(first + b + 2) % num_pairs for b in range(PAIRS)]


def make_image_ids(rank: int) -> list[int]:
    """Make the ids of a rank's three images: two are one image, and the third is also one of the other rank."""
    return [[0, 0, 5], [5, 11, 5]][rank]


def make_queue_ids() -> list[int]:
    """Make the ids of the queue's images; some are those of the pairs, and -100 stands where no pair was."""
    return [0, 5, 99, 11, 0, 98, 1, 97, 96, 95, -100, -100]
