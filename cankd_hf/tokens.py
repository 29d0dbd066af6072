"""What looks like a secret in text: it is refused in recipes, and never printed or written."""

import os
import re
from collections.abc import Iterator

NO_TOKEN = (
    "tokens are not taken as settings, they would end up in files and logs; set the environment variable "
    "HF_TOKEN or run `hf auth login`"
)
_LOOKS_LIKE_ONE = re.compile(
    r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bapi_org_[A-Za-z0-9]{16,}"
    r"|\b(?:gh[opsur]_|github_pat_|glpat-|wandb_v1_|sk-)[A-Za-z0-9_-]{20,}"  # GitHub, GitLab, W&B, OpenAI
    r"|\bxox[a-z]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\bA[KS]IA[0-9A-Z]{16}\b"  # AWS
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"  # a JSON web token
    r"|(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+(?=@)"  # https://user:password@host
    r"|(?<=://)[^/\s:@'\"]{16,}(?=@)"  # https://token@host
    r"|(?<=[?&;])(?i:[\w-]*(?:token|api_?key|secret|password|signature))=[^&\s'\"]{4,}"
)
_SECRET_WORDS = ("password", "passwd", "passphrase", "secret", "api_key", "apikey", "secret_key", "access_key")
_SECRET_KEY = re.compile(rf"(?:.*_)?(?:{'|'.join(_SECRET_WORDS)}|private_key|credentials?)|auth|authorization")
_TOKEN_KEY = re.compile(r"(?:.*_)?token")


def mask(text: str) -> str:
    """The text with `***` in place of what looks like a secret or is one of this environment."""
    for secret in _of_environment():
        text = text.replace(secret, "***")
    return _LOOKS_LIKE_ONE.sub("***", text)


def holds_secret(text: str) -> bool:
    """Whether a part of the text looks like a secret, or is one of this environment."""
    return _LOOKS_LIKE_ONE.search(text) is not None or any(secret in text for secret in _of_environment())


def is_secret(key: object, value: object) -> bool:
    """Whether a setting of this name with this value is a secret: `api_key: ...`, `hub_token: ...`.

    Not one are counts (`num_register_tokens: 4`) and special tokens of a vocabulary (`mask_token: "[MASK]"`).
    """
    name = str(key).lower().replace("-", "_")
    if value in (None, "") or isinstance(value, bool | dict | list):
        return False
    if _TOKEN_KEY.fullmatch(name):
        return isinstance(value, str) and not value.startswith(("<", "["))
    return _SECRET_KEY.fullmatch(name) is not None


def _of_environment() -> Iterator[str]:
    """Values of variables such as HF_TOKEN and WANDB_API_KEY."""
    for name, value in os.environ.items():
        if len(value) >= 12 and is_secret(name, value):
            yield value
