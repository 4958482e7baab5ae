"""What context parallelism asks of a configuration. Nothing here imports torch."""


def check_load_balancer(load_balancer: str | None) -> str | None:
    """What is wrong with the name of a load balancer, or None."""
    if load_balancer in ("headtail", None):
        return None
    return (
        f'parallelism.context_parallel_load_balancer = "{load_balancer}": no such load balancer; '
        'use "headtail", or leave it out for none'
    )


def check_sequence(seq_len: int, degree: int, load_balancer: str | None, key: str = "training.seq_len") -> str | None:
    """Why sequences of `seq_len` tokens cannot be spread over `degree` ranks, or None if they can.

    The rule: equal chunks, `degree` of them, or twice as many with the load balancer "headtail".

    Args:
        key: where the length is configured.
    """
    unknown = check_load_balancer(load_balancer)
    if unknown is not None:
        return unknown
    chunks = 2 * degree if load_balancer else degree
    if seq_len > 0 and seq_len % chunks == 0:
        return None
    below = seq_len // chunks * chunks
    nearest = f"{below} or {below + chunks}" if below > 0 else f"{chunks}"
    each = f"2 x {degree} = {chunks}" if load_balancer else f"{degree}"
    balancer = ' with context_parallel_load_balancer = "headtail"' if load_balancer else ""
    return (
        f"{key} = {seq_len} is not a multiple of {each}, the chunks into which "
        f"parallelism.context_parallel_degree = {degree}{balancer} cuts a sequence; the nearest lengths are {nearest}"
    )


def check_rotate_method(rotate_method: str, backend: str, document_masking: bool) -> str | None:
    """Why keys and values cannot travel in this way, or None if they can.

    The rule: "alltoall" works with causal attention alone, since masks are cut for all keys in natural order.

    Args:
        backend: a resolved attention backend.
    """
    key = f'parallelism.context_parallel_rotate_method = "{rotate_method}"'
    if rotate_method not in ("allgather", "alltoall"):
        return f'{key}: no such method; use "allgather" or "alltoall"'
    if rotate_method == "allgather":
        return None
    if document_masking:
        return (
            f"{key} cannot keep documents apart, and training.document_masking is set; "
            'set context_parallel_rotate_method = "allgather", or turn training.document_masking off'
        )
    if backend == "flex":
        return (
            f'{key} does not work with model.attention_backend = "flex"; '
            'set context_parallel_rotate_method = "allgather", or model.attention_backend = "auto"'
        )
    return None
