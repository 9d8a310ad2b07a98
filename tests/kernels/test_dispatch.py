from __future__ import annotations

import threading

import pytest

from farl_kernels.dispatch import Op, use_backend


@pytest.fixture
def op():
    op = Op("double")
    op.register("fast", lambda x, *, wide=False: ("fast", 2 * x), lambda x, *, wide=False: "wide" if wide else None)
    op.register("slow", lambda x, *, wide=False: ("slow", 2 * x))
    return op


def test_first_that_does_not_refuse(op):
    assert op.names == ("fast", "slow")
    assert op(None, 3) == ("fast", 6)
    assert op(None, 3, wide=True) == ("slow", 6)


def test_explicit_backend_is_obeyed_or_refused(op):
    assert op("slow", 3) == ("slow", 6)
    with pytest.raises(ValueError, match="double: backend 'fast' cannot run this call: wide"):
        op("fast", 3, wide=True)
    with pytest.raises(ValueError, match="double: backend 'other' is not one of fast, slow"):
        op("other", 3)


def test_nothing_fits_tells_every_reason(op):
    narrow = Op("narrow")
    narrow.register("a", lambda x: x, lambda x: "too long")
    narrow.register("b", lambda x: x, lambda x: "too odd")
    with pytest.raises(ValueError, match=r"no backend can run this call \(a: too long; b: too odd\)"):
        narrow(None, 1)


def test_use_backend_holds_inside_and_explicit_wins(op):
    with use_backend("slow"):
        assert op(None, 1)[0] == "slow"
        assert op("fast", 1)[0] == "fast"
        with use_backend(None):
            assert op(None, 1)[0] == "fast"
        assert op(None, 1)[0] == "slow"
    assert op(None, 1)[0] == "fast"


def test_use_backend_leaves_ops_without_that_name_alone(op):
    Op("other").register("somewhere_else", lambda x: x)
    with use_backend("somewhere_else"):
        assert op(None, 1)[0] == "fast"


def test_use_backend_refuses_a_name_that_no_op_has(op):
    with (
        pytest.raises(ValueError, match=r"'tritn' is the backend of no op; there are .*fast.*slow"),
        use_backend("tritn"),
    ):
        op(None, 1)


def test_what_declines_serves_only_when_asked():
    picky = Op("picky")
    picky.register("a", lambda x: ("a", x), declines=lambda x: "slower than b" if x > 5 else None)
    picky.register("b", lambda x: ("b", x), lambda x: "too long" if x > 7 else None)
    assert picky(None, 5)[0] == "a" and picky(None, 6)[0] == "b" and picky("a", 6)[0] == "a"
    with pytest.raises(ValueError, match=r"a: slower than b; b: too long"):
        picky(None, 8)


def test_use_backend_ends_with_an_error(op):
    with pytest.raises(KeyError), use_backend("slow"):
        raise KeyError
    assert op(None, 1)[0] == "fast"


def test_use_backend_reaches_the_threads_of_a_backward_pass(op):
    seen = []
    with use_backend("slow"):
        thread = threading.Thread(target=lambda: seen.append(op(None, 1)[0]))
        thread.start()
        thread.join()
    assert seen == ["slow"]
