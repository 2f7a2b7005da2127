"""What a jaxpr consists of."""

import jax


def equations(jaxpr):
    """All equations in order, those of inner jaxprs, such as of scans and kernels, included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def stated_costs(function, *arrays):
    """The costs of the kernels that a function calls, in order."""
    jaxpr = jax.make_jaxpr(function)(*arrays).jaxpr
    costs = (equation.params.get("cost_estimate") for equation in equations(jaxpr))
    return [cost for cost in costs if cost]
