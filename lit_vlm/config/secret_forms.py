"""The forms of secrets, by which they are known wherever they stand. Prefixes are their issuers' own."""

from __future__ import annotations

import re

HEX_DIGEST = re.compile(r"[0-9a-f]{40}")  # a key of W&B, until 2025; and what git and SHA-1 call everything
# Before it a digest is meant: commit=..., "revision": "...", .../snapshots/..., package@...
NO_DIGEST_BEFORE = re.compile(
    r"""(commit|revision|digest|sha-?1|sha|rev|ref|tree|oid|hash)["']?\s*[=:]\s*["']?$|[/@]$""", re.I
)
_HIDDEN = "<redacted>"
_KEEPS_NAME = rf"\g<1>{_HIDDEN}"

_PREFIXED = (
    r"hf_[A-Za-z0-9]{20,}",  # Hugging Face
    r"wandb_v\d+_\w{16,}",  # Weights & Biases
    r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic and others
    r"gh[pousr]_[A-Za-z0-9]{16,}",  # GitHub
    r"github_pat_\w{16,}",
    r"glpat-[\w-]{16,}",  # GitLab
    r"(?<![A-Z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Z0-9])",  # AWS
    r"AIza[\w-]{30,}",  # Google
    r"(?<![A-Za-z0-9])xox[a-z]-[\w-]{10,}",  # Slack
    r"(?<![A-Za-z0-9])xapp-[\w-]{10,}",
    r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{30,}",
    r"(?<![A-Za-z0-9])pypi-[\w-]{40,}",
    r"(?<![A-Za-z0-9])nvapi-[\w-]{20,}",  # NVIDIA
    r"(?<![A-Za-z0-9])r8_[A-Za-z0-9]{30,}",  # Replicate
    r"(?<![\w-])eyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*",  # a JSON web token: header, payload, signature
)
_SIGNED = (
    "x-amz-signature x-amz-credential x-amz-security-token x-goog-signature x-goog-credential awsaccesskeyid signature sig"
    " token access_token auth api_key apikey key secret password"
).split()


def _digestless(match: re.Match[str]) -> str:
    """A run of 40 hexadecimal digits is left where a digest is meant."""
    before = match.string[max(0, match.start() - 24) : match.start()]
    return match[0] if NO_DIGEST_BEFORE.search(before) else _HIDDEN


FORMS = (
    (
        re.compile(r"-----BEGIN ([A-Z ]*)PRIVATE KEY-----.*?(-----END \1PRIVATE KEY-----|\Z)", re.DOTALL),
        _HIDDEN,
    ),
    (re.compile("|".join(_PREFIXED)), _HIDDEN),
    (re.compile(r"(?<![0-9A-Za-z])(?:local-)?[0-9a-f]{40}(?![0-9A-Za-z])"), _digestless),
    (re.compile(r"((?:\bBearer|\bBasic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.I), _KEEPS_NAME),
    # user:password@host; with one slash where an address was taken for a path
    (re.compile(r"(:/{1,2})[^/\s@'\"]*:[^/\s'\"]*(?=@)"), _KEEPS_NAME),
    (re.compile(r"(://)[^/\s@:'\"]{20,}(?=@)"), _KEEPS_NAME),  # token@host
    (re.compile(rf"([?&](?:{'|'.join(_SIGNED)})=)[^&\s#'\"]+", re.I), _KEEPS_NAME),
)
