"""Patterns of secrets: known token formats and `NAME=value` assignments. The token prefixes are those of their issuers."""

from __future__ import annotations

import re
from collections.abc import Callable

REDACTED = "<redacted>"
HEX_DIGEST = re.compile(r"[0-9a-f]{40}")  # a W&B key until 2025, and also any git commit or SHA-1 digest
# Text before a digest that is not a secret: commit=..., "revision": "...", git checkout ..., .../snapshots/..., package@...
# A digest with a file extension is the name of a file.
DIGEST_CONTEXT = re.compile(
    r"""(commit|revision|digest|sha-?1|sha|rev|ref|tree|oid|hash|\bid|image|file|version|(?<![a-z])(?:run_?name|group|tags?|name))"""
    r"""["']?\s*[=:\s]\s*(?:\[(?:[^\[\]]*,)?\s*|(?:-\s[^\n]*\n\s*)*-\s+)?["']?$|\bgit\s[^;&|\n]*\s$|[/@]$""",
    re.I,
)
_NAME_PREFIX = re.compile(r"\w[-_.]$")  # sft-<digest>
_NAME_SUFFIX = re.compile(r"[-_/][A-Za-z0-9]")  # <digest>-sft
_KEY_CONTEXT = re.compile(r"(login|key|api|token|secret|passw?o?r?d?|auth)[-_.]?$", re.I)
_CONTEXT_CHARACTERS = 60  # characters before a digest that are searched

# A variable, a command, a placeholder, or no value: not the secret itself
_REFERENCE = re.compile(
    r"\$\w+|\$\{[^}]*\}|\$\([^)]*\)|`[^`]*`|<[^<>]*>|\*+|\.{3}|…|null|none|true|false|yes|no|on|off|\d{1,3}|~", re.I
)
_PATH = re.compile(r"(~|\.{1,2})?(/[\w.@-]+)+")
_RANDOM_PATH_PART = re.compile(
    r"(?=[^/]*\d)(?=[^/]*[a-z])(?=[^/]*[A-Z])[^/]{8,}"
)  # random characters, not a folder name
_PLAIN_PATH = re.compile(r"[a-z\d_.-]+(/[a-z\d_.-]+)+")

_TOKEN_START = r"(?<![A-Za-z0-9])"
_RANDOM_CHARACTERS = r"(?:(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{16}|[A-Za-z]{32})"
_TOKEN_PATTERNS = (
    r"hf_[A-Za-z0-9]{20,}",  # Hugging Face, user
    r"api_org_[A-Za-z0-9]{20,}",  # Hugging Face, organisation
    r"wandb_v\d+_\w{16,}",  # Weights & Biases
    # OpenAI, Anthropic and others; needs one long random run, because names have short words, dates and commits
    rf"sk-(?={_RANDOM_CHARACTERS}|(?:[A-Za-z0-9]*[-_]){{1,12}}?(?![0-9a-f]{{40}}(?![A-Za-z0-9])){_RANDOM_CHARACTERS})[A-Za-z0-9_-]{{16,}}",
    r"(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
    r"gsk_[A-Za-z0-9]{20,}",  # Groq
    r"(?:xai|pplx)-[A-Za-z0-9]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{16,}",  # GitHub
    r"github_pat_\w{16,}",
    r"gl(?:pat|rt|dt|ptt|oas|soat|cbt)-[\w-]{16,}",  # GitLab
    r"(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Z0-9])",  # AWS
    r"AIza[\w-]{30,}",  # Google
    r"ya29\.[\w-]{20,}",
    r"GOCSPX-[\w-]{20,}",
    r"xox[a-z]-[\w-]{10,}",  # Slack
    r"xapp-[\w-]{10,}",
    r"npm_[A-Za-z0-9]{30,}",
    r"pypi-[\w-]{40,}",
    r"nvapi-[\w-]{20,}",  # NVIDIA
    r"r8_[A-Za-z0-9]{30,}",  # Replicate
    r"dckr_pat_[\w-]{20,}",  # Docker
    r"hvs\.[\w-]{20,}",  # Vault
    r"SG\.[\w-]{16,}\.[\w-]{16,}",  # SendGrid
    r"SK[0-9a-f]{32}(?![0-9A-Za-z])",  # Twilio
    r"\d{8,10}:AA[\w-]{32,}",  # Telegram bot
    r"AGE-SECRET-KEY-1[0-9A-Z]{20,}",
    r"(?<![\w-])eyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*",  # JSON web token: header, payload, signature
)
_SECRET_QUERY_KEYS = (
    "x-amz-signature x-amz-credential x-amz-security-token x-goog-signature x-goog-credential awsaccesskeyid signature sig"
    " access_token api_key apikey client_secret secret password"
).split()
_AMBIGUOUS_QUERY_KEYS = "token auth key".split()
_NAME_PATTERN = r"(?<!\w)(?P<name>[^\W\d][\w.-]{0,80}+)"
# A name and its value: NAME=value, --name value, "name": "value", ${oc.env:NAME,value}; and name: value, as in headers,
# where the value is likely a secret.
_AFTER_OPENING_QUOTE = (
    r"(?![\s,\]}:;)]|\Z)"  # after a quote that opens a text; otherwise the quote closes the text around the name
)
_AFTER_OPENING_QUOTE_OF_LINE = (
    r"(?!\s*[,\]}:;)]|\s*\Z|[ \t]*\n)"  # the same on one line, where a password may begin with a space
)
_SHELL_VALUE = re.compile(
    rf"""\$\([^)\n]*\)|`[^`\n]*`|<[^<>\n]*>|('"'"'|'\\''|\\["']){_AFTER_OPENING_QUOTE_OF_LINE}[^\n]*?\1"""
    rf"""|"{_AFTER_OPENING_QUOTE_OF_LINE}[^"\n]*"|'{_AFTER_OPENING_QUOTE_OF_LINE}[^'\n]*'"""
    rf"""|(?:"{_AFTER_OPENING_QUOTE}(?:\\.|[^"\\])*"|'{_AFTER_OPENING_QUOTE}[^']*'|\\[^"']|[^\s"'\\&;|])+"""
)
JSON_KEY = re.compile(r"""\\?["'](?P<name>[A-Za-z_][\w.-]{0,80}+)\\?["']\s{0,4}:\s{0,4}""")
HEADER = re.compile(rf"(?<!\.){_NAME_PATTERN}:[ \t]{{0,4}}")
ASSIGNMENT_PATTERNS = (
    (re.compile(rf"""{_NAME_PATTERN}["']?[ \t]{{0,4}}(?:=>|:=|={{1,2}})[ \t]{{0,4}}"""), _SHELL_VALUE),
    (
        re.compile(
            r"\b(?:setenv|set -g?x|ENV|ARG|configure set|printf -v)[ \t]{1,4}(?P<name>[A-Za-z_][\w.]{0,80}+)[ \t]{1,4}"
            r"""(?:["']?%[sbq](?:\\n)?["']?[ \t]{1,4})?"""
        ),
        _SHELL_VALUE,
    ),
    (
        re.compile(r"\bread[ \t]{1,4}(?:-\w{1,8}[ \t]{1,4}){0,4}(?P<name>[A-Za-z_]\w{0,80}+)[ \t]{0,4}<<<[ \t]{0,4}"),
        _SHELL_VALUE,
    ),
    (re.compile(r"(?<![\w-])--?(?P<name>[A-Za-z][\w.-]{0,80}+)\s{1,8}(?!-)"), _SHELL_VALUE),
    (JSON_KEY, re.compile(r"""\\?"(?:\\[^"]|[^"\\])*\\?"|'[^']*'|[^\s"',}\]\\{\[]+""")),
    (re.compile(r"\$\{oc\.env:(?P<name>\w{1,80}),"), re.compile(r"[^}]+")),
    (HEADER, re.compile(r"""[^\s"',;]{6,}""")),
)


def is_reference(value: str) -> bool:
    """Return True if a value refers to a secret or is empty: `$HF_TOKEN`, `<your key>`, `null`."""
    return not value.strip() or _REFERENCE.fullmatch(value.strip()) is not None


def is_path(value: str) -> bool:
    """Return True if a value is a file path, such as the path of a key file. Base64 text also contains slashes."""
    return _PATH.fullmatch(value.strip()) is not None and _RANDOM_PATH_PART.search(value) is None


def is_likely_secret(value: str) -> bool:
    """Return True if a value looks like a password and not like a word, a number or a path."""
    value = value.strip("\"' ")
    if len(value) < 8 or is_reference(value) or is_path(value) or _PLAIN_PATH.fullmatch(value):
        return False
    letters, digits = bool(re.search("[A-Za-z]", value)), bool(re.search(r"\d", value))
    mixed = bool(re.search("[a-z][A-Z]|[A-Z]{2}[a-z]", value))
    symbols = bool(re.search(r"[!#%^&*+=?$~]", value))
    return letters and (digits or mixed or symbols or re.fullmatch("[A-Za-z]{20,}", value) is not None)


def redact_digest(match: re.Match[str], name: str = "") -> str:
    """Redact 40 hexadecimal digits, except where they are a digest or part of a name or a path.

    Args:
        name: name of the setting that contains the text.
    """
    if match[0].startswith("local-"):  # only W&B writes this form
        return REDACTED
    before = (f"{name}=" if name else "") + match.string[max(0, match.start() - _CONTEXT_CHARACTERS) : match.start()]
    if DIGEST_CONTEXT.search(before):
        return match[0]
    is_named = _NAME_PREFIX.search(before) or _NAME_SUFFIX.match(match.string, match.end())
    return match[0] if is_named and not _KEY_CONTEXT.search(before) else REDACTED


def _redact_value(match: re.Match[str]) -> str:
    """Redact the value of a match and keep its name; keep a value that is only a reference."""
    return match[0] if is_reference(match[2].strip("\"'")) else match[1] + REDACTED


def _redact_likely_value(match: re.Match[str]) -> str:
    """Redact the value of a match only if it is likely a secret."""
    return match[1] + REDACTED if is_likely_secret(match[2]) else match[0]


SECRET_PATTERNS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(
            r"-----BEGIN ([A-Z ]{0,40})PRIVATE KEY(?: BLOCK)?-----(?:[A-Za-z0-9+/=\s:,-]|\\[nr])*?"
            r"(?:-----END \1PRIVATE KEY(?: BLOCK)?-----|(?=[^A-Za-z0-9+/=\s:,\\-]|\Z))"
        ),
        REDACTED,
    ),
    (re.compile(_TOKEN_START + "(?:" + "|".join(_TOKEN_PATTERNS) + ")"), REDACTED),
    (re.compile(r"(?<![0-9A-Za-z])(?:local-)?[0-9a-f]{40}(?![0-9A-Za-z]|\.[a-z]{2,5}\b)"), redact_digest),
    (re.compile(r"((?:\bBearer|\bBasic)\s+)([A-Za-z0-9._~+/=-]{8,})", re.I), _redact_likely_value),
    # Authorization: token ..., also in JSON
    (
        re.compile(r"""(\bauthorization\\?["']?\s*[:=]\s*\\?["']?(?:[A-Za-z-]+\s+)?)([^\s'",;}\\]{6,})""", re.I),
        _redact_value,
    ),
    (
        re.compile(r"""(\b(?:curl|wget)\b[^\n;|]{0,200}?\s(?:-u|--user)[ =]?["']?[^\s:'"]{1,80}:)([^\s'"]+)"""),
        _redact_value,
    ),
    (
        re.compile(r"""(\b(?:sshpass|mysql\w*|docker login)\b[^\n;|]{0,200}?\s-p[ =]?['"]{0,5})([^\s'"]+)"""),
        _redact_value,
    ),
    (re.compile(r"""(\bredis-cli\b[^\n;|]{0,200}?\s(?:-a|--pass)[ =]\s{0,4}['"]{0,5})([^\s'"]+)"""), _redact_value),
    (re.compile(r"""(\b(?:un)?zip\b[^\n;|]{0,200}?\s-P\s{0,4}['"]{0,5})([^\s'"]+)"""), _redact_value),
    (re.compile(r"""(\b(?:7z[azr]?|(?:un)?rar)\b[^\n;|]{0,200}?\s['"]{0,5}-h?p['"]{0,5})([^\s'"]+)"""), _redact_value),
    # mount -o user=bob,pass=...
    (re.compile(r"""(\bmount\b[^\n;|]{0,200}?[\s,'"]pass=)([^\s,;'"]+)"""), _redact_value),
    (re.compile(r"""(\buser(?:name)?=[^\s,;'"]{1,80},(?:[^\s;'"]{0,200},)?pass=)([^\s,;'"]+)"""), _redact_value),
    (re.compile(r"(\bmachine\s+\S{1,200}\s+login\s+\S{1,200}\s+password\s+)([^\s'\"\\]+)"), _redact_value),  # ~/.netrc
    (re.compile(r"(\bhooks\.slack\.com/services/|\bdiscord(?:app)?\.com/api/webhooks/)([^\s'\"]+)"), _redact_value),
    # user:password@host; one slash where a URL was treated as a path; the digest of a container image is no password
    (re.compile(r"(:/{1,2})([^/\s@'\"]{0,200}:[^/\s'\"]{0,200})(?=@(?!sha\d+:))"), _redact_value),
    (re.compile(r"(://)([^/\s@:'\"]{20,200})(?=@)"), _redact_value),  # token@host
    (
        re.compile(r"((?<![\w/:.])[\w.+-]{1,40}:)([^\s/@:'\"]{8,200})(?=@[\w-]+(?:\.[\w-]+)*[:/])"),
        _redact_likely_value,
    ),
    (re.compile(rf"([?&](?:{'|'.join(_SECRET_QUERY_KEYS)})=)([^&\s#'\"]+)", re.I), _redact_value),
    (re.compile(rf"([?&](?:{'|'.join(_AMBIGUOUS_QUERY_KEYS)})=)([^&\s#'\"]+)", re.I), _redact_likely_value),
)
PROSE_SECRET_PATTERNS = SECRET_PATTERNS[:2]  # private keys and prefixed tokens: no sentence contains them by chance
