"""Texts for people, logs and manifests, without what only this process may know.

An error may quote what somebody gave: a variable of the environment, a URL with a password, a presigned link.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote

HIDDEN = "***"
NAMED = re.compile(r"secret|token|passw|credential|private.?key|api.?key|access.?key", re.IGNORECASE)
MIN_CHARACTERS = 8  # a shorter value is a word that may stand in any text
# A path made of a URL has one slash after its colon.
USER = re.compile(r"(\w:/+)[^/\s'\"@]+@")
QUERY = re.compile(r"(\w:/+[^\s'\"?]*\?)[^\s'\"]+")
SIGNED = re.compile(r"((?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId)=)[^&\s'\"]+",
                    re.IGNORECASE)


def redacted(text: str) -> str:
    """The text with `***` for secrets of the environment, users and queries of URLs, and signatures."""
    for value in sorted({value for name, value in os.environ.items() if NAMED.search(name)}, key=len, reverse=True):
        if len(value) >= MIN_CHARACTERS:
            text = text.replace(value, HIDDEN).replace(quote(value, safe=""), HIDDEN)
    for pattern, kept in ((USER, rf"\1{HIDDEN}@"), (QUERY, rf"\1{HIDDEN}"), (SIGNED, rf"\1{HIDDEN}")):
        text = pattern.sub(kept, text)
    return text
