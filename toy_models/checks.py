"""How a value of a case checks its fields: counts, numbers, choices and flags, each within bounds. Stdlib only.

Knows no field but by its name. Whatever is wrong is a ValueError with the name and the value.
"""

# Bounds on what a case file from a stranger may ask for: far above what is drawn, far below what hurts.
MOST = {
    "world": 64, "layers": 64, "experts": 256, "hidden": 1024, "heads": 128, "kv_heads": 128, "head_dim": 256,
    "ffn": 4096, "shared_ffn": 4096, "vocab": 4096, "rows": 1024, "prompt": 1024, "response": 1024,
    "micro_rows": 64, "epochs": 16, "mini_batches": 64, "dense_ffn": 4096, "expert_groups": 256, "group_topk": 256,
}  # fmt: skip


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_counts(value: object, **least: int) -> None:
    for name, low in least.items():
        number = getattr(value, name)
        require(type(number) is int, f"{name}={number!r} must be an int")
        high = MOST.get(name, 2**31)
        require(low <= number <= high, f"{name}={number} must lie in {low}..{high}")


def check_reals(value: object, **bounds: tuple[float, float]) -> None:
    for name, (low, high) in bounds.items():
        number = getattr(value, name)
        require(type(number) in (int, float), f"{name}={number!r} must be a number")
        require(low <= number <= high, f"{name}={number} must lie in {low}..{high}")


def check_choice(value: object, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        chosen = getattr(value, name)
        require(chosen in allowed, f"{name}={chosen!r} is unknown; choose one of {', '.join(allowed)}")


def check_flags(value: object, *names: str) -> None:
    for name in names:
        require(type(getattr(value, name)) is bool, f"{name}={getattr(value, name)!r} must be True or False")
