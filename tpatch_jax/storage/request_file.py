"""A file of edit requests, read and checked before any work begins."""

from pathlib import Path

from tpatch_jax.core.arguments import as_path
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest, parse_request
from tpatch_jax.storage.json_lines import read_json_lines

__all__ = ["read_requests"]


def read_requests(path: str | Path) -> list[EditRequest]:
    """Read and check a file of requests, one JSON object a line.

    ``{"id"?, "prompt", "target", "subject"?, "rephrases"?: [], "locality"?: [], "keep"?: []}``; other keys are errors.
    Of an image classifier it is ``"image"`` in place of ``"prompt"``: the path of a picture, relative to the file; of a
    model of speech ``"audio"``, the path of a recording, and ``"instead_of"?``.

    Args:
        path: the file, UTF-8; empty lines are passed over.

    Returns:
        The requests in order.

    Raises:
        TPatchError: the file is missing, empty or not UTF-8, a line is not such an object, or an id occurs twice; the
            message names the line.

    Example:
        >>> read_requests("requests.jsonl")  # doctest: +SKIP
        [EditRequest(prompt='The capital of France is', target='Lyon', ...)]
    """
    path = as_path(path, "read_requests(path)", "a file of requests; give its path")
    requests, seen = [], {}
    for number, where, record in read_json_lines(path, "request"):
        request = parse_request(record, where, path.parent)
        if request.id is not None and request.id in seen:
            raise TPatchError(f"{where}: the id {request.id!r} was used in line {seen[request.id]}; give each its own")
        seen[request.id] = number
        requests.append(request)
    if not requests:
        raise TPatchError(f"{path} holds no request; put one JSON object a line, with 'prompt' and 'target'")
    return requests
