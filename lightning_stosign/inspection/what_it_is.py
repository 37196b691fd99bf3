"""What a file is that is no checkpoint: told by its first bytes."""

from lightning_stosign.inspection.input_file import InputFile

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: `git lfs pull` fetches it"),
    (b"GGUF", "is a GGUF model: weights for inference, without optimizer states"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras), not a PyTorch checkpoint"),
    (b"\x93NUMPY", "is a NumPy array, not a PyTorch checkpoint"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard: unpack it first"),
    (b"BZh", "is compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ\x00", "is compressed by xz: unpack it first"),
    (b"SQLite format 3\x00", "is an SQLite database, not a PyTorch checkpoint"),
    (b"\x7fELF", "is a program, not a PyTorch checkpoint"),
    (b"%PDF", "is a PDF document, not a PyTorch checkpoint"),
    (b"\x89PNG", "is an image, not a PyTorch checkpoint"),
)


def describe(file: InputFile) -> str:
    """Return what a file is, as the rest of a sentence that begins with its path."""
    head = file.read(0, min(file.size, 512))
    if not head:
        return "is empty"
    for start, text in _STARTS:
        if head.startswith(start):
            return text
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it and inspect what is in it"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "is a plain Python pickle, not written by torch.save; only torch.save's files are read"
    if not head.strip(b"\0"):
        return "is truncated, or not a PyTorch checkpoint: it begins with zeros"
    try:
        head.decode("utf-8")
    except UnicodeDecodeError:
        return "is truncated, or not a PyTorch checkpoint: it is no zip archive"
    return "is not a PyTorch checkpoint: it is text"
