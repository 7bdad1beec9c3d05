"""Views that ask for the request's ``BackgroundTasks`` by an annotation."""

from __future__ import annotations

import functools
import threading
import typing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import MagicMock

import pytest
from flask import Blueprint, Flask, g, request
from flask.views import MethodView, View
from typing_extensions import TypeAliasType

import wsgi_bg
from tests.support import TIMEOUT, lazy_module
from wsgi_bg import BackgroundTasks, background_tasks, inject
from wsgi_bg.exceptions import InjectionError
from wsgi_bg.flask import Background

if TYPE_CHECKING:
    from collections.abc import Iterator

    from werkzeug.test import TestResponse

    from wsgi_bg import BackgroundTasks as Hidden  # noqa: F401
    from wsgi_bg._tasks.background_tasks import BackgroundTasks as HiddenBackgroundTasks


@pytest.fixture
def done() -> list[Any]:
    """Results of tasks."""
    return []


@pytest.fixture
def app() -> Flask:
    app = Flask(__name__)
    app.testing = True  # errors reach the test
    Background(app)
    return app


def get(app: Flask, path: str = "/", method: str = "GET") -> TestResponse:
    return app.test_client().open(path, method=method, buffered=True)


def add(app: Flask, view: Callable[..., Any], rule: str = "/", **options: Any) -> None:
    app.add_url_rule(rule, view_func=view, **options)


def looks_like(tasks: Any) -> str:
    """Check that a view got the same tasks as the proxy."""
    assert isinstance(tasks, BackgroundTasks)
    assert tasks == background_tasks
    return "the request's"


PARAMETERS = [
    "tasks: BackgroundTasks",
    "bg: BackgroundTasks",
    "tasks: 'BackgroundTasks'",
    "tasks: wsgi_bg.BackgroundTasks",
    "tasks: Annotated[BackgroundTasks, 'after the response']",
    "tasks: Optional[BackgroundTasks]",
    "tasks: Optional['BackgroundTasks'] = None",
    "tasks: BackgroundTasks | None",
    "tasks: BackgroundTasks | None = None",
    "tasks: Annotated[Optional[BackgroundTasks], 'doc'] = None",
    "*, tasks: BackgroundTasks",
]


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_a_view_gets_the_tasks_of_its_annotation(
    app: Flask, parameter: str, kind: str, future: str
) -> None:
    name = parameter.removeprefix("*, ").split(":")[0]
    names: dict[str, Any] = {**vars(typing), **vars(wsgi_bg), "wsgi_bg": wsgi_bg}
    names["looks_like"] = looks_like
    source = f"{future}{kind} view({parameter}):\n    return looks_like({name})"
    # Compiled without this module's import of annotations.
    exec(compile(source, "views.py", "exec", dont_inherit=True), names)
    add(app, names["view"])
    assert get(app).text == "the request's"
    assert get(app).text == "the request's"


def test_the_tasks_of_a_view_run_in_order_beside_its_url_values(
    app: Flask, done: list[Any]
) -> None:
    @app.post("/orders/<int:number>")
    def order(number: int, tasks: BackgroundTasks) -> dict[str, int]:
        tasks.add_task(done.append, number)
        background_tasks.add_task(done.append, "proxy")
        return {"number": number}

    assert get(app, "/orders/7", "POST").json == {"number": 7}
    assert done == [7, "proxy"]


class Items(MethodView):
    def get(self, bg: BackgroundTasks) -> str:
        return looks_like(bg)

    def post(self, tasks: BackgroundTasks) -> str:
        return looks_like(tasks)

    async def put(self, later: BackgroundTasks) -> str:
        return looks_like(later)

    def delete(self) -> str:
        return "wants none"


def named(view: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(view)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return view(*args, **kwargs)

    return wrapper


class Decorated(Items):
    decorators: typing.ClassVar = [named]
    init_every_request = False


@pytest.mark.parametrize("items", [Items, Decorated])
def test_each_method_of_a_method_view_gets_its_tasks(
    app: Flask, items: type[MethodView]
) -> None:
    add(app, items.as_view("items"))
    for method in ("GET", "POST", "PUT"):
        assert get(app, "/", method).text == "the request's"
    assert get(app, "/", "DELETE").text == "wants none"
    assert get(app, "/", "HEAD").status_code == 200
    assert get(app, "/", "OPTIONS").status_code == 200


def test_a_view_class_gets_the_tasks_in_dispatch_request(app: Flask) -> None:
    class Page(View):
        def dispatch_request(self, tasks: BackgroundTasks) -> str:  # type: ignore[override]
            return looks_like(tasks)

    add(app, Page.as_view("page"))
    assert get(app).text == "the request's"


def test_a_method_view_that_overrides_dispatch_gets_the_tasks_or_passes_them_on(
    app: Flask,
) -> None:
    class Asks(Items):
        def dispatch_request(self, tasks: BackgroundTasks, **values: Any) -> Any:  # type: ignore[override]
            return looks_like(tasks) + " in dispatch_request"

    class PassesOn(Items):
        def dispatch_request(self, **values: Any) -> Any:
            return super().dispatch_request(**values)

    add(app, Asks.as_view("asks"), "/asks")
    add(app, PassesOn.as_view("passes"), "/passes")
    assert get(app, "/asks").text == "the request's in dispatch_request"
    assert get(app, "/passes").text == "the request's"


def test_views_of_nested_blueprints_get_the_tasks(app: Flask) -> None:
    outer, inner = Blueprint("outer", __name__), Blueprint("inner", __name__)

    @inner.get("/<lang>/page")
    def page(tasks: BackgroundTasks) -> str:
        return f"{looks_like(tasks)} {g.lang}"

    @inner.url_value_preprocessor
    def take_lang(endpoint: str | None, values: dict[str, Any] | None) -> None:
        assert values is not None
        g.lang = values.pop("lang")

    outer.register_blueprint(inner, url_prefix="/inner")
    app.register_blueprint(outer, url_prefix="/outer")
    assert get(app, "/outer/inner/en/page").text == "the request's en"


def test_decorated_views_get_the_tasks(app: Flask) -> None:
    @app.get("/")
    @named
    @named
    def view(tasks: BackgroundTasks) -> str:
        return looks_like(tasks)

    class Called:
        def __call__(self, tasks: BackgroundTasks) -> str:
            return looks_like(tasks)

    def two(number: int, tasks: BackgroundTasks) -> str:
        return looks_like(tasks) + str(number)

    add(app, inject(view), "/inject", endpoint="inject")
    add(app, Called(), "/object", endpoint="object")
    add(app, functools.partial(two, 5), "/partial", endpoint="partial")
    add(app, Items().get, "/method", endpoint="method")
    assert get(app).text == "the request's"
    for path in ("/inject", "/object", "/method"):
        assert get(app, path).text == "the request's"
    assert get(app, "/partial").text == "the request's5"


def test_a_decorator_with_a_tasks_argument_is_left_alone(app: Flask) -> None:
    mine = BackgroundTasks()

    def with_mine(view: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        def wrapper() -> Any:
            return view(mine)

        return wrapper

    @app.get("/")
    @with_mine
    def view(tasks: BackgroundTasks) -> str:
        assert tasks is mine
        return "its own"

    assert get(app).text == "its own"


def test_a_value_of_another_preprocessor_wins(app: Flask) -> None:
    mine = BackgroundTasks()
    other = Flask("other")

    @other.url_value_preprocessor
    def give(endpoint: str | None, values: dict[str, Any] | None) -> None:
        assert values is not None
        values["tasks"] = mine

    Background(other)

    @other.get("/")
    def view(tasks: BackgroundTasks) -> str:
        assert tasks is mine
        return "its own"

    assert get(other).text == "its own"


def test_a_function_that_the_view_calls_gets_the_same_object(
    app: Flask, done: list[Any]
) -> None:
    @inject
    def charge(amount: int, tasks: BackgroundTasks) -> None:
        tasks.add_task(done.append, amount)

    @app.get("/")
    def view(tasks: BackgroundTasks) -> str:
        charge(5)
        tasks.add_task(done.append, "view")
        assert len(tasks.tasks) == 2
        return ""

    get(app)
    assert done == [5, "view"]


def test_a_view_without_such_a_parameter_is_called_as_ever(app: Flask) -> None:
    class Shop:
        """A type of the application's."""

    @app.get("/<int:number>")
    def view(
        number: int, shop: Shop | None = None, *rest: BackgroundTasks, **other: int
    ) -> str:
        assert (shop, rest, other) == (None, (), {})
        assert request.view_args == {"number": number}
        return str(number)

    assert get(app, "/5").text == "5"
    assert get(app, "/static/nothing").status_code == 404
    assert get(app, "/no/such/page").status_code == 404


def test_an_annotation_of_another_parameter_need_not_be_resolved(app: Flask) -> None:
    def with_user(view: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        def wrapper(**values: Any) -> Any:
            return view("Ada", **values)

        return wrapper

    @app.get("/<name>")
    @with_user
    def view(user: Missing, name: Missing, tasks: BackgroundTasks) -> str:  # type: ignore[name-defined]  # noqa: F821
        return f"{looks_like(tasks)} {user} {name}"

    assert get(app, "/Grace").text == "the request's Ada Grace"


def test_a_url_value_of_the_same_name_is_an_error_that_names_the_parameter(app: Flask) -> None:
    @app.get("/<tasks>")
    def view(tasks: BackgroundTasks) -> str:
        return ""

    with pytest.raises(
        TypeError,
        match=r"'tasks' of .*view is annotated BackgroundTasks, and a "
        r"value of the URL too: rename",
    ) as caught:
        get(app, "/5")
    assert isinstance(caught.value, InjectionError)
    assert caught.value.parameter == "tasks"
    assert caught.value.function.endswith("view")


def test_an_annotation_that_cannot_be_resolved_names_the_import(app: Flask) -> None:
    @app.get("/")
    def view(tasks: HiddenBackgroundTasks) -> str:
        return ""

    for _ in range(2):
        with pytest.raises(
            TypeError,
            match=r"'tasks' of .*view has an annotation that cannot be "
            r"resolved \(name 'HiddenBackgroundTasks' is not defined\): import",
        ):
            get(app)


def test_a_positional_only_parameter_is_refused(app: Flask) -> None:
    @app.get("/")
    def view(tasks: BackgroundTasks, /) -> str:
        return ""

    with pytest.raises(
        TypeError, match="is positional only, and Flask gives arguments by name"
    ):
        get(app)


def test_without_the_middleware_in_the_way_the_view_is_named(app: Flask) -> None:
    @app.get("/")
    def view(tasks: BackgroundTasks) -> str:
        return ""

    @app.get("/optional")
    def optional(tasks: BackgroundTasks | None = None) -> str:
        return "none" if tasks is None else ""

    get(app)
    with (
        app.test_request_context("/"),
        pytest.raises(RuntimeError, match=r"view wants the request's BackgroundTasks"),
    ):
        app.dispatch_request()
    with app.test_request_context("/optional"):
        assert app.dispatch_request() == "none"


def test_the_metadata_of_a_view_stays(app: Flask) -> None:
    seen: list[Any] = []

    @app.get("/<int:number>")
    def view(number: int, tasks: BackgroundTasks) -> str:
        """What it does."""
        return ""

    view.is_exempt = True  # type: ignore[attr-defined]  # as Flask extensions do

    @app.before_request
    def look() -> None:
        function: Any = app.view_functions["view"]
        seen.extend((function.__name__, function.__doc__, function.is_exempt))
        seen.append(request.view_args)

    get(app, "/5")
    assert seen == ["view", "What it does.", True, {"number": 5}]


def test_first_requests_on_many_threads_get_the_tasks_too(app: Flask) -> None:
    @app.get("/")
    def view(tasks: BackgroundTasks) -> str:
        return looks_like(tasks)

    barrier = threading.Barrier(8, timeout=TIMEOUT)

    def visit(number: int) -> str:
        barrier.wait()
        return get(app).text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(visit, range(8))) == ["the request's"] * 8


def test_a_view_is_looked_at_once(app: Flask) -> None:
    looks: list[type] = []

    def look() -> type:
        looks.append(int)
        return int

    names: dict[str, Any] = {"look": look}
    exec("def view(number: 'look()' = 5) -> str: return str(number)", names)
    add(app, names["view"])
    for _ in range(3):
        assert get(app).text == "5"
    assert len(looks) == 1


def test_a_streaming_view_adds_tasks_while_it_streams(app: Flask, done: list[Any]) -> None:
    @app.get("/")
    def view(tasks: BackgroundTasks) -> Iterator[str]:
        def stream() -> Iterator[str]:
            yield "a"
            tasks.add_task(done.append, "from the stream")
            yield "b"

        return stream()

    assert get(app).text == "ab"
    assert done == ["from the stream"]


# Views that cannot be inspected, or cannot be injected


def odd_cache() -> Any:
    return functools.cache(lambda: "odd")


def odd_cache_that_wants() -> Any:
    @functools.cache
    def view(tasks: BackgroundTasks | None = None) -> str:
        return "odd"

    return view


def odd_mock() -> Any:
    return MagicMock(return_value="odd", methods=["GET"], required_methods=())


def odd_loop() -> Any:
    def view() -> str:
        return "odd"

    view.__wrapped__ = view  # type: ignore[attr-defined]
    return view


def odd_equality() -> Any:
    class Column:
        def __eq__(self, other: object) -> bool:
            raise TypeError("Boolean value of this clause is not defined")

        __hash__ = None  # type: ignore[assignment]

    def view(number: int = 5) -> str:
        return "odd"

    view.__annotations__["number"] = Column()
    return view


def odd_signature() -> Any:
    class View:
        __signature__ = 5

        def __call__(self) -> str:
            return "odd"

    return View()


@pytest.mark.parametrize(
    "make", [odd_cache, odd_cache_that_wants, odd_mock, odd_loop, odd_equality, odd_signature]
)
def test_a_view_that_cannot_be_looked_at_is_called_as_ever(
    app: Flask, make: Callable[[], Any]
) -> None:
    add(app, make(), endpoint="odd")
    assert get(app).text == "odd"


def test_a_view_without_a_rule_harms_none(app: Flask) -> None:
    @app.endpoint("no rule")
    def unreachable() -> str:
        raise AssertionError

    @app.get("/")
    def view(tasks: BackgroundTasks) -> str:
        return looks_like(tasks)

    assert get(app).text == "the request's"


def test_a_refused_view_leaves_all_further_views_alone(app: Flask) -> None:
    @app.get("/<tasks>")
    def refused(tasks: BackgroundTasks) -> str:
        """What it does."""
        return ""

    @app.get("/")
    def view(tasks: BackgroundTasks) -> str:
        return looks_like(tasks)

    assert get(app).text == "the request's"
    assert app.view_functions["refused"].__doc__ == "What it does."
    lengths = set()
    for _ in range(3):
        with pytest.raises(InjectionError) as caught:
            get(app, "/5")
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1


def test_an_annotation_that_cannot_be_resolved_is_the_cause(app: Flask) -> None:
    @app.get("/")
    def view(tasks: HiddenBackgroundTasks) -> str:
        return ""

    with pytest.raises(InjectionError) as caught:
        get(app)
    assert isinstance(caught.value.__cause__, NameError)


LAZY = """
def view(tasks: BackgroundTasks, order: Order | None = None) -> Response:
    return looks_like(tasks)
"""


def test_an_annotation_may_have_a_name_that_only_type_checkers_know(app: Flask) -> None:
    module = lazy_module(LAZY, BackgroundTasks=BackgroundTasks, looks_like=looks_like)
    add(app, module["view"])
    assert get(app).text == "the request's"


def test_the_name_of_the_tasks_has_to_be_known_at_run_time(app: Flask) -> None:
    add(app, lazy_module(LAZY)["view"])
    add(app, lazy_module("def other(order: Order = 1): return str(order)")["other"], "/other")
    with pytest.raises(InjectionError, match="not under TYPE_CHECKING only") as caught:
        get(app)
    assert isinstance(caught.value.__cause__, NameError)
    assert get(app, "/other").text == "1"


def mine(view: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(view)
    def wrapper(*self: Any) -> Any:
        return view(*self, BackgroundTasks())

    return wrapper


class Mine(MethodView):
    @mine
    def get(self, tasks: BackgroundTasks) -> str:
        return "its own"


def test_a_parameter_that_a_decorator_fills_is_not_injected(app: Flask) -> None:
    @mine
    def positional(tasks: BackgroundTasks, /) -> str:
        return "its own"

    @mine
    def hidden(tasks: HiddenBackgroundTasks) -> str:
        return "its own"

    add(app, positional, "/positional")
    add(app, hidden, "/hidden")
    add(app, Mine.as_view("mine"), "/method")
    for path in ("/positional", "/hidden", "/method"):
        assert get(app, path).text == "its own"


def test_a_name_that_only_begins_like_ours_need_not_be_resolved(app: Flask) -> None:
    @app.get("/<number>")
    def view(number: BackgroundTasks5, options: BackgroundTasksOptions | None = None) -> str:  # type: ignore[name-defined]  # noqa: F821
        return str(number)

    assert get(app, "/5").text == "5"


def test_a_url_values_annotation_need_not_be_resolved(app: Flask) -> None:
    @app.get("/<tasks>")
    def view(tasks: HiddenBackgroundTasks) -> str:
        return str(tasks)

    assert get(app, "/5").text == "5"


def test_a_method_view_may_define_head_and_name_methods_without_a_function(
    app: Flask,
) -> None:
    heads: list[str] = []

    class Page(MethodView):
        methods = {"GET", "HEAD", "POST"}  # noqa: RUF012

        def get(self, tasks: BackgroundTasks) -> str:
            return looks_like(tasks)

        def head(self, bg: BackgroundTasks) -> str:
            heads.append(looks_like(bg))
            return ""

    add(app, Page.as_view("page"))
    assert get(app).text == "the request's"
    assert get(app, "/", "HEAD").status_code == 200
    assert heads == ["the request's"]


def test_a_head_method_that_does_not_ask_for_the_tasks_is_not_given_those_of_get(
    app: Flask,
) -> None:
    heads: list[str] = []

    class Page(MethodView):
        def get(self, tasks: BackgroundTasks) -> str:
            return looks_like(tasks)

        def head(self) -> str:
            heads.append(request.method)
            return ""

    add(app, Page.as_view("page"))
    assert get(app).text == "the request's"
    assert get(app, "/", "HEAD").status_code == 200
    assert heads == ["HEAD"]


def test_a_method_view_whose_head_is_none_answers_head_by_get(app: Flask) -> None:
    given: list[str] = []

    class Page(MethodView):
        head = None

        def get(self, tasks: BackgroundTasks) -> str:
            given.append(looks_like(tasks))
            return ""

    add(app, Page.as_view("page"))
    assert get(app, "/", "HEAD").status_code == 200
    assert given == ["the request's"]


def test_a_method_view_may_have_no_get(app: Flask) -> None:
    class Page(MethodView):
        def post(self, tasks: BackgroundTasks) -> str:
            return looks_like(tasks)

    add(app, Page.as_view("page"))
    assert get(app, "/", "POST").text == "the request's"
    assert get(app, "/", "HEAD").status_code == 405


def test_a_rule_may_name_more_methods_than_its_method_view(app: Flask) -> None:
    class Page(MethodView):
        methods = ["GET"]  # noqa: RUF012

        def get(self, tasks: BackgroundTasks) -> str:
            return looks_like(tasks)

        def post(self, bg: BackgroundTasks) -> str:
            return looks_like(bg)

    add(app, Page.as_view("page"), methods=["GET", "POST"])
    assert get(app).text == "the request's"
    assert get(app, "/", "POST").text == "the request's"


def test_first_requests_on_two_threads_look_once() -> None:
    looks: list[type] = []
    looking, second, go_on = (threading.Event() for _ in range(3))

    def look() -> type:
        looks.append(int)
        looking.set()
        assert go_on.wait(TIMEOUT)
        return int

    app = Flask("shop")
    Background(app)
    names: dict[str, Any] = {"look": look}
    exec("def view(number: 'look()' = 5) -> str: return str(number)", names)
    add(app, names["view"])
    texts: list[str] = []

    def visit() -> None:
        if looking.is_set():
            second.set()
        texts.append(get(app).text)

    threads = [threading.Thread(target=visit) for _ in range(2)]
    threads[0].start()
    assert looking.wait(TIMEOUT)
    threads[1].start()
    assert second.wait(TIMEOUT)
    go_on.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert texts == ["5", "5"]
    assert len(looks) == 1


def test_an_argument_of_a_partial_wins(app: Flask) -> None:
    mine = BackgroundTasks()

    def view(tasks: BackgroundTasks) -> str:
        return "mine" if tasks is mine else "the request's"

    add(app, functools.partial(view, tasks=mine), endpoint="view")
    assert get(app).text == "mine"


@pytest.mark.parametrize(
    "meant", [BackgroundTasks, BackgroundTasks | None, Annotated[BackgroundTasks, "doc"]]
)
def test_a_type_alias_is_resolved(app: Flask, meant: Any) -> None:
    # The objects that the statement "type Tasks = ..." makes, from Python 3.12.
    names: dict[str, Any] = {
        "Tasks": TypeAliasType("Tasks", meant),
        "looks_like": looks_like,
    }
    exec("def view(tasks: Tasks): return looks_like(tasks)", names)
    add(app, names["view"])
    assert get(app).text == "the request's"


def test_a_url_value_of_another_view_may_have_the_name(app: Flask) -> None:
    @app.get("/others/<tasks>")
    def other(tasks: str) -> str:
        return tasks

    @app.get("/")
    def view(tasks: BackgroundTasks) -> str:
        return looks_like(tasks)

    assert get(app).text == "the request's"
    assert get(app, "/others/5").text == "5"
