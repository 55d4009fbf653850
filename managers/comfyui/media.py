"""What a file is, by its first bytes: nobody's name for it, and no header, is believed.

Pure, and without a picture library: it only tells pictures, films and sounds from all else. Must never call a file
good: whether it can be read is ComfyUI's to find out.
"""

from __future__ import annotations

from msgspec import Struct

HEAD = 512
"""How many of the first bytes are looked at."""


class Media(Struct, frozen=True):
    """`type` is the media type, `ending` the usual end of a file's name, with its dot."""

    type: str
    ending: str


_PNG, _JPEG, _GIF = Media("image/png", ".png"), Media("image/jpeg", ".jpg"), Media("image/gif", ".gif")
_MP4, _MOV, _M4A = Media("video/mp4", ".mp4"), Media("video/quicktime", ".mov"), Media("audio/mp4", ".m4a")
_AVIF, _HEIC = Media("image/avif", ".avif"), Media("image/heic", ".heic")
_MP3, _AAC = Media("audio/mpeg", ".mp3"), Media("audio/aac", ".aac")

_BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", _PNG),
    (b"\xff\xd8\xff", _JPEG),
    (b"GIF87a", _GIF),
    (b"GIF89a", _GIF),
    (b"II*\0", Media("image/tiff", ".tif")),
    (b"MM\0*", Media("image/tiff", ".tif")),
    (b"\x76\x2f\x31\x01", Media("image/x-exr", ".exr")),
    (b"\0\0\0\x0cJXL \r\n\x87\n", Media("image/jxl", ".jxl")),
    (b"FLV\x01", Media("video/x-flv", ".flv")),
    (b"\0\0\x01\xba", Media("video/mpeg", ".mpg")),
    (b"ID3", _MP3),
    (b"\xff\xfb", _MP3),
    (b"\xff\xf3", _MP3),
    (b"\xff\xf2", _MP3),
    (b"\xff\xf1", _AAC),
    (b"\xff\xf9", _AAC),
    (b"fLaC", Media("audio/flac", ".flac")),
)
_RIFF = {
    b"WEBP": Media("image/webp", ".webp"),
    b"WAVE": Media("audio/wav", ".wav"),
    b"AVI ": Media("video/x-msvideo", ".avi"),
}
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"), _HEIC),
    **dict.fromkeys((b"M4A ", b"M4B ", b"F4A "), _M4A),
    b"qt  ": _MOV,
}


def media_in(head: bytes) -> Media | None:
    """The kind of picture, film or sound that begins with these bytes; None: it is none, or nobody knows it."""
    for beginning, media in _BEGINNINGS:
        if head.startswith(beginning):
            return media
    match head[:4]:
        case b"RIFF":
            return _RIFF.get(head[8:12])
        case b"FORM":
            return Media("audio/aiff", ".aiff") if head[8:12] in (b"AIFF", b"AIFC") else None
        case b"OggS":
            return Media("video/ogg", ".ogv") if b"theora" in head[:64] else Media("audio/ogg", ".ogg")
        case b"\x1aE\xdf\xa3":
            return Media("video/webm", ".webm") if b"webm" in head[:64] else Media("video/x-matroska", ".mkv")
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], _MP4)
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return Media("image/bmp", ".bmp")
    if head[:1] == b"G" and head[188:189] == b"G" and head[376:377] == b"G":
        return Media("video/mp2t", ".ts")
    return None
