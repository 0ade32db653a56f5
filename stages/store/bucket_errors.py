"""What went wrong on the way to a bucket, in words that help and hold no secret.

The S3 client tells its errors as one long text: the request's URL, the server's answer and its own structures, among
them key ids and the string that was signed. Here the few facts that can be shown are read off; the rest is dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stages.lib.errors import RemoteError, TemporaryRemoteError


@dataclass(frozen=True)
class Trouble:
    """What happened, what to do, and whether the same request may succeed later."""

    what: str
    advice: str
    temporary: bool = False

    def error(self, where: str, name: str) -> RemoteError:
        """The error to raise for one object of the bucket; name '' means the bucket as a whole."""
        kind = TemporaryRemoteError if self.temporary else RemoteError
        return kind(f"{f'{where}/{name}' if name else where}: {self.what}\n  {self.advice}")


LATER = "it was tried several times; run the same command again: what is done stays done"
CREDENTIALS = "run `aws sso login` or `aws configure`, or set store.profile (AWS_PROFILE) to a profile that may"
REGION = "set store.region to the bucket's region: aws s3api get-bucket-location --bucket BUCKET"
CODES = {
    "NoSuchBucket": Trouble("there is no such bucket", "set store.url to a bucket that exists: aws s3 ls"),
    "AccessDenied": Trouble("access denied", "see who you are: aws sts get-caller-identity; it needs s3:GetObject, "
                            "PutObject, DeleteObject and ListBucket; or set store.profile to another profile"),
    "AllAccessDisabled": Trouble("access to the bucket is disabled", "ask the bucket's owner; or set store.url"),
    "InvalidAccessKeyId": Trouble("the server does not know this access key", CREDENTIALS),
    "SignatureDoesNotMatch": Trouble("the secret key is wrong, or something on the way changes requests", CREDENTIALS),
    "ExpiredToken": Trouble("the session has expired", "run `aws sso login`, or get new session credentials"),
    "TokenRefreshRequired": Trouble("the session has expired", "run `aws sso login`, or get new session credentials"),
    "InvalidToken": Trouble("the session token is not valid", "run `aws sso login`, or get new session credentials"),
    "RequestTimeTooSkewed": Trouble("this machine's clock is more than 15 minutes off the server's",
                                    "set the clock: timedatectl set-ntp true; then compare with `date -u`"),
    "AuthorizationHeaderMalformed": Trouble("the bucket is in another region", REGION),
    "PermanentRedirect": Trouble("the bucket is in another region", REGION),
    "IllegalLocationConstraintException": Trouble("the bucket is in another region", REGION),
    "InvalidBucketName": Trouble("this is no name of a bucket", "set store.url to s3://BUCKET/PREFIX"),
    "QuotaExceeded": Trouble("the bucket's quota is used up", "free space: roadmill store gc"),
    "EntityTooLarge": Trouble("the object is too large for the server", "ask who runs the server for its limit"),
    "InvalidObjectState": Trouble("the object lies in an archive class", "restore it: aws s3api restore-object"),
    "NotImplemented": Trouble("the server lacks something of S3 that the store needs",
                              "set store.url to a bucket of AWS, or of a server with conditional puts and multipart"),
}
KMS = Trouble("the key of the encryption can't be used", "set store.sse_kms_key to a key that you may use")
# refused, yet the next attempt may pass: bytes that changed on the way, a slow body, a concurrent conditional write
SECOND_CHANCE = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "RequestTimeout",
                 "InvalidDigest", "IncompleteBody", "ConditionalRequestConflict", "OperationAborted", "NoSuchUpload",
                 "InvalidPart", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException",
                 "RequestLimitExceeded", "BandwidthLimitExceeded"}
WIRE = (  # what the client says of a connection -> what happened
    (r"ConnectionRefused", "the connection was refused", "is the server up? check store.endpoint: curl -sI ENDPOINT"),
    (r"dns error", "the server's name can't be looked up", "check store.endpoint, store.region and the network"),
    (r"invalid peer certificate|InvalidCertificate|UnknownIssuer", "the server's certificate is not valid here", ""),
    (r"InvalidContentType|CorruptMessage", "the server does not speak TLS", ""),
    (r"TimedOut|Timeout", "no answer, or nothing moved, for too long", LATER),
    (r"ConnectionReset|BrokenPipe|ConnectionAborted|IncompleteMessage|IncompleteBody|UnexpectedEof|NoContentRange",
     "the connection broke", LATER),
    (r"NetworkUnreachable|HostUnreachable", "the server can't be reached", "check store.endpoint and the network"),
    (r"InvalidListResponse|InvalidMultipartResponse|InvalidDeleteObjectsResponse|ResponseBody",
     "the server's answer was cut or is no S3", LATER),
)


def read_trouble(text: str) -> Trouble:
    """What the S3 client's text of an error comes down to."""
    code = "".join(re.findall(r"<Code>([\w.]+)</Code>|\(code: (\w+)\)", text)[0]) if _CODE.search(text) else ""
    status = int(found[1]) if (found := re.search(r"status(?: code)?: (\d{3})", text)) else 0
    said = " ".join(filter(None, (f"HTTP {status}" if status else "", code)))
    if "External AWS credential provider" in text:
        return Trouble("AWS's credential chain gives no usable credentials", CREDENTIALS)
    if code in CODES:
        return Trouble(f"{CODES[code].what} ({said})", CODES[code].advice)
    if code.startswith("KMS"):
        return Trouble(f"{KMS.what} ({said})", KMS.advice)
    if code in SECOND_CHANCE or status in (408, 409, 429) or status >= 500:
        return Trouble(f"the server is overloaded or in trouble ({said})" if code != "BadDigest" and status != 400 else
                       f"the bytes that arrived are not those that were sent ({said})", LATER, temporary=True)
    if "BareRedirect" in text or 300 <= status < 400:
        return Trouble("the server points elsewhere: the bucket is in another region, or this is no S3 server", REGION)
    if status in (401, 403):
        return Trouble(f"access denied ({said})", CODES["AccessDenied"].advice)
    if status == 400 and not code:  # to a HEAD, whose answer says no more
        return Trouble(f"the server refuses ({said})", LATER, temporary=True)
    if status:
        return Trouble(f"the server refuses ({said})", "check store.url and store.endpoint: aws s3 ls BUCKET")
    if odd := re.search(r'InvalidPath \{.*?path: ("(?:[^"\\]|\\.){1,200}")', text, re.DOTALL):
        return Trouble(f"it has an object whose name no file can have: {odd[1]}",
                       "remove it with `aws s3 rm`, or set store.url to a prefix that only Roadmill writes to")
    for pattern, what, advice in WIRE:
        if re.search(pattern, text):
            return Trouble(what, advice or "check store.endpoint: https:// or http://, and the machine's certificates",
                           temporary=bool(advice))
    return Trouble("the S3 client failed in a way that is not known here", LATER, temporary=True)


_CODE = re.compile(r"<Code>[\w.]+</Code>|\(code: \w+\)")
