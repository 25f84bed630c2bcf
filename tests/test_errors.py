from app import errors


def drawn() -> dict[str, str]:
    """{class: the one that it is drawn under} of the module's docstring."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip("| -").split(" ")[0]
        if name == "ServiceError" or line.lstrip("| ").startswith("- "):
            depth = line.index(name) // 3
            path[depth:] = [name]
            if depth:
                parents[name] = path[depth - 1]
    return parents


def test_the_tree_is_as_drawn():
    classes = {
        name: kind.__bases__[0].__name__
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and kind is not errors.ServiceError
    }
    assert drawn() == classes


def test_overloaded_says_when_to_come_back():
    error = errors.Overloaded("full", 2.5)
    assert (str(error), error.retry_after) == ("full", 2.5)
