"""The tests of the package: faithmap's kit on its explainer. Run as `pytest conformance_of_blurmap.py`."""

from faithmap import conformance


@conformance.parametrized("explainer", ["blurred-gradient"], models=["shapes/resnet"], slow=False)
def test_blurred_gradient(case: conformance.Case) -> None:
    case.run()
