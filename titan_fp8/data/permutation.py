"""A shuffled order of n items that is computed, not stored.

Shuffling a list of a billion blocks needs gigabytes on every rank, and resuming needs the list again. A keyed
bijection needs neither: `permuted(i, n, key)` says which item stands at place i, in constant time and memory. The
construction is a Feistel network: split a number into two halves and, round after round, xor one half with a hash of
the other. Each round can be undone, so the whole maps the numbers below a power of four one to one, whatever the hash
is. Where n is not a power of four, *cycle walking* applies the network again until the result is below n; since the
domain is below 4 n, that takes fewer than four tries on average (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002).
"""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6


def mix(*values: int) -> int:
    """A 64-bit hash of integers: the SplitMix64 finalizer (Steele, Lea and Flood, 2014), chained over the values."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) + _GOLDEN & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permuted(index: int, size: int, key: int) -> int:
    """The item at place `index` of the order that `key` makes of `range(size)`.

    For a fixed size and key the results for index 0, ..., size - 1 are the numbers 0, ..., size - 1, each once.
    """
    assert 0 <= index < size, (index, size)
    half_bits = (max(size - 1, 1).bit_length() + 1) // 2
    half_mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & half_mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ mix(key, round_number, right) & half_mask
        value = left << half_bits | right
        if value < size:
            return value
