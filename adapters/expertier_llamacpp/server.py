"""The OpenAI-compatible server of llama-cpp-python, with the experts on storage.

``python -m expertier_llamacpp.server --model m.gguf --expert_budget 8GiB`` takes every option of
``python -m llama_cpp.server`` and every option of :class:`expertier.config.OffloadOptions` with the prefix ``expert_``,
on the command line, in the environment (``EXPERT_BUDGET``, or ``EXPERTIER_BUDGET`` as everywhere) and per model in the
stock ``--config_file``.

Upstream symbols that are touched, all of them public:

* ``llama_cpp.server.settings.ModelSettings`` is subclassed: the options are fields like the stock ones.
* ``llama_cpp.server.model.LlamaProxy.load_llama_from_model_settings`` is wrapped: it tells the options of the model
  that is about to be constructed.
* ``llama_cpp.Llama`` is replaced: it is the class that function constructs, and whose methods the routes call.

``GET /expertier/stats`` and ``GET /metrics`` tell what it counts, as JSON and for Prometheus.

With ``--max-sequences 8`` the two routes of completions are ours (:mod:`expertier_llamacpp.batch.routes`): many
requests are computed together, where the stock ones hold a lock for one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import llama_cpp
import pydantic
import uvicorn
from fastapi import Depends, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from llama_cpp.server import app as stock_app
from llama_cpp.server.cli import add_args_from_model, parse_model_from_args
from llama_cpp.server.model import LlamaProxy
from llama_cpp.server.settings import ModelSettings, ServerSettings

from expertier.config import OffloadOptions
from expertier.errors import ConfigFileError, ExpertierError, UnsupportedOptionError
from expertier.quality.serving import describe_losses
from expertier.scheduling import BATCHERS, CONTROL, Fairness, make_batcher
from expertier.scheduling.fairness import PREFIX as FAIRNESS
from expertier.telemetry.metrics import CONTENT_TYPE, expose
from expertier_llamacpp.batch import BatchEngine
from expertier_llamacpp.batch.routes import batch_router
from expertier_llamacpp.exact import ExactnessMiddleware
from expertier_llamacpp.llama import Llama

if TYPE_CHECKING:
    from fastapi import FastAPI

PREFIX: Final = "expert_"
REFUSED: Final = 2
"""Exit status when the server cannot start as asked."""

_options: ContextVar[dict[str, Any]] = ContextVar("options of the model that is being loaded")


def _option_fields() -> dict[str, Any]:
    """Pydantic field definitions for every option of the one table; ``None`` means not given."""
    hints = get_type_hints(OffloadOptions)
    found: dict[str, Any] = {}
    for option in fields(OffloadOptions):
        kinds = get_args(hints[option.name])
        if get_origin(hints[option.name]) is Literal:
            kinds = (hints[option.name], bool)  # YAML reads `on` and `off` as truth values
        # The stock command line understands typing.Union only, and converts to its first type.
        kind: Any = Union.__getitem__((*(kinds or (hints[option.name],)), None))
        described = f"{option.metadata['help']} (default: {option.default})"
        found[PREFIX + option.name] = (kind, pydantic.Field(default=None, description=described))
    return found


class _ServedModel(ModelSettings):
    # The stock server asks to lock the whole model in memory: the opposite of a bounded budget.
    use_mlock: bool = pydantic.Field(default=False, description="Use mlock (for everything but the experts).")
    max_sequences: int = pydantic.Field(
        default=1, ge=1, description="Requests that are computed together; with 1 they are served one after the other."
    )
    budget_endpoint: bool = pydantic.Field(
        default=False, description="Let POST /expertier/budget change the memory for experts while the server runs."
    )
    scheduling: str = pydantic.Field(
        default=CONTROL, description=f"Who joins next when more wait: {', '.join(BATCHERS)} (with max_sequences)."
    )


def _fairness_fields() -> dict[str, Any]:
    """The same for the limits of fairness."""
    hints = get_type_hints(Fairness)
    return {
        FAIRNESS + limit.name: (
            Union.__getitem__((hints[limit.name], None)),
            pydantic.Field(default=None, description=f"{_LIMITS[limit.name]} (default: {limit.default})."),
        )
        for limit in fields(Fairness)
    }


_LIMITS: Final = {
    "overtaken": "Later requests that may join before one that waits",
    "steps": "Steps after its turn from which on nobody overtakes a request",
    "held": "Steps for which a place may stay empty so that several prompts are computed together",
    "seconds": "Seconds after its turn from which on nobody overtakes a request, and for which a place may stay empty",
}


OffloadModelSettings: Final[Any] = pydantic.create_model(
    "OffloadModelSettings", __base__=_ServedModel, **_option_fields(), **_fairness_fields()
)
"""The stock model settings and the options of Expertier."""


class OffloadSettings(ServerSettings, OffloadModelSettings):  # type: ignore[misc]
    """Everything the command line takes for one model."""


class OffloadConfigFile(ServerSettings):
    """The stock configuration file, whose models may carry options of Expertier."""

    models: list[OffloadModelSettings] = pydantic.Field(default=[], description="Model configs")


class ServedLlama(Llama):
    """What the stock server constructs in place of ``llama_cpp.Llama``."""

    def __init__(self, model_path: str, **kwargs: Any) -> None:
        super().__init__(model_path, **{**_options.get({}), **kwargs})
        if not kwargs.get("verbose", True):  # else it was printed
            print(self.mode_line(), file=sys.stderr)


def _with_options(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def load(settings: Any) -> Any:
        names = ["max_sequences", *(PREFIX + option.name for option in fields(OffloadOptions))]
        given = {name: getattr(settings, name, None) for name in names}
        token = _options.set({name: value for name, value in given.items() if value is not None})
        try:
            return stock(settings)
        finally:
            _options.reset(token)

    return load


def create_app(server: ServerSettings, models: Sequence[ModelSettings]) -> FastAPI:
    """Build the stock application over offloaded models, and load the first model.

    Parameters
    ----------
    server : ServerSettings
        Host, port, keys and the like.
    models : sequence of OffloadModelSettings
        The models it can serve; one is loaded at a time.

    Raises
    ------
    ExpertierError
        When the first model cannot be loaded as asked.
    """
    together = _serves_together(models)
    stock_load = LlamaProxy.load_llama_from_model_settings
    if llama_cpp.Llama is not ServedLlama:
        llama_cpp.Llama = ServedLlama  # type: ignore[misc]
        setattr(LlamaProxy, "load_llama_from_model_settings", staticmethod(_with_options(stock_load)))  # noqa: B010
    # The stock function would read the file again, without our options.
    config_file = os.environ.pop("CONFIG_FILE", None)
    try:
        app: FastAPI = stock_app.create_app(server_settings=server, model_settings=list(models))
    finally:
        if config_file is not None:
            os.environ["CONFIG_FILE"] = config_file

    model = _loaded()
    if together is not None and model is not None:
        engine = BatchEngine.over(model, scheduling=together.scheduling, fairness=_fairness(together))
        engine.start()
        app.state.batch_engine = engine
        stock_routes = list(app.router.routes)
        app.include_router(batch_router(engine))
        ours = app.router.routes[len(stock_routes) :]
        app.router.routes[:] = [*ours, *stock_routes]  # the first that matches answers
    app.add_middleware(ExactnessMiddleware)
    app.add_api_route(
        "/expertier/stats", _stats, dependencies=[Depends(stock_app.authenticate)], tags=["Expertier"], methods=["GET"]
    )
    app.add_api_route(
        "/metrics", _metrics, dependencies=[Depends(stock_app.authenticate)], tags=["Expertier"], methods=["GET"],
        response_model=None,
    )  # fmt: skip
    app.state.budget_endpoint = any(getattr(model, "budget_endpoint", False) for model in models)
    app.add_api_route(
        "/expertier/budget", _resize, dependencies=[Depends(stock_app.authenticate)], tags=["Expertier"],
        methods=["POST"], response_model=None,
    )  # fmt: skip
    return app


def _serves_together(models: Sequence[ModelSettings]) -> Any:
    """The model whose requests are computed together, or ``None``; what cannot be is refused, before any work."""
    wanted: list[Any] = [model for model in models if getattr(model, "max_sequences", 1) > 1]
    if not wanted:
        for model in models:
            chosen = getattr(model, "scheduling", CONTROL)
            if chosen != CONTROL:
                raise UnsupportedOptionError(
                    f"scheduling={chosen!r} chooses among requests that wait to be computed together; this server "
                    "computes one after the other.",
                    "Add --max-sequences 8, or leave --scheduling out.",
                )
            for name in _fairness_fields():
                if getattr(model, name, None) is not None:
                    problem = f"{name} does nothing without max_sequences."
                    raise UnsupportedOptionError(problem, "Add --max-sequences 8.")
        return None
    model = wanted[0]
    impossible = {
        "several models": len(models) > 1,
        "embedding": model.embedding,
        "cache (common beginnings of prompts are kept anyway)": model.cache,
        "draft_model": model.draft_model is not None,
        "clip_model_path": model.clip_model_path is not None,
    }
    for name, asked in impossible.items():
        if asked:
            raise UnsupportedOptionError(f"max_sequences cannot be combined with {name}.", "Leave one of them out.")
    make_batcher(model.scheduling)
    _fairness(model)
    return model


def _fairness(model: Any) -> Fairness:
    return Fairness.from_options(model.model_dump())


def _loaded() -> Llama | None:
    """The model that is loaded now."""
    model = None if stock_app._llama_proxy is None else stock_app._llama_proxy._current_model
    return model if isinstance(model, Llama) else None


def _stats(request: Request) -> dict[str, Any]:
    """Counters of the model that is loaded now; answered while it generates, too."""
    model = _loaded()
    if model is None or stock_app._llama_proxy is None:
        raise HTTPException(503, "No model is loaded.")
    stats = {"model": stock_app._llama_proxy._current_model_alias, "mode": model.mode_line()}
    stats |= model.offload.stats().as_dict()
    stats |= describe_losses(model.virtual, model.quality)
    engine = getattr(request.app.state, "batch_engine", None)
    return stats if engine is None else {**stats, "engine": engine.stats().as_dict()}


def _metrics() -> Response:
    """The same counters in Prometheus' text format, under the names they have in vLLM; one process, so of rank 0."""
    model = _loaded()
    if model is None:
        return Response(media_type=CONTENT_TYPE)
    record = {"rank": 0, **model.offload.stats().as_dict(), **describe_losses(model.virtual, model.quality)}
    return Response(expose([record]), media_type=CONTENT_TYPE)


class _Budget(pydantic.BaseModel, extra="forbid"):
    """Body of ``POST /expertier/budget``."""

    budget: str | int


def _resize(request: Request, asked: _Budget) -> Any:
    """Change the memory for experts; answered when they hold no more than that, and requests go on meanwhile."""
    model = _loaded()
    try:
        if not request.app.state.budget_endpoint:
            raise UnsupportedOptionError(
                "Changing the budget over HTTP is off.", "Turn it on at start: --budget_endpoint true."
            )
        if model is None:
            raise HTTPException(503, "No model is loaded.")
        model.resize(asked.budget)
    except ExpertierError as error:
        status = 403 if isinstance(error, UnsupportedOptionError) else 400
        return JSONResponse(error.as_body(), status_code=status)
    return _stats(request)


def _read_config(path: Path) -> OffloadConfigFile:
    remedy = "See --config_file in the documentation of llama-cpp-python's server."
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml  # type: ignore[import-untyped]

            try:
                text = json.dumps(yaml.safe_load(text))
            except (yaml.YAMLError, TypeError) as error:
                raise ConfigFileError(f"{path} is not YAML that JSON could say: {error}.", remedy) from error
    except OSError as error:
        raise ConfigFileError(f"The configuration file {path} cannot be read: {error.strerror}.", remedy) from error
    except UnicodeDecodeError as error:
        raise ConfigFileError(f"The configuration file {path} is not text: {error}.", remedy) from error
    return OffloadConfigFile.model_validate_json(text)


def _underscored(word: str) -> str:
    """Let ``--max-sequences`` be what the stock command line writes ``--max_sequences``."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _settings(arguments: Sequence[str] | None) -> tuple[ServerSettings, list[ModelSettings]]:
    parser = argparse.ArgumentParser(
        prog="python -m expertier_llamacpp.server",
        description="The OpenAI-compatible server of llama-cpp-python, with the experts on storage.",
    )
    # argparse reads a per cent sign in a help text as a placeholder.
    add_args_from_model(parser, OffloadSettings)
    for action in parser._actions:
        if action.dest.startswith(PREFIX) and action.help:
            action.help = action.help.replace("%", "%%")
    parser.add_argument("--config_file", type=str, help="Path to a config file to load.")
    given = parser.parse_args([_underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)])
    config_file = os.environ.get("CONFIG_FILE", given.config_file)
    if config_file:
        config = _read_config(Path(config_file))
        return ServerSettings.model_validate(config, from_attributes=True), list(config.models)
    server: Any = parse_model_from_args(ServerSettings, given)
    return server, [parse_model_from_args(OffloadModelSettings, given)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the server; what cannot be done as asked ends in one line and exit status 2."""
    try:
        server, models = _settings(arguments)
        if not models:
            raise UnsupportedOptionError("No model was named.", "Give --model, or models in the --config_file.")
        app = create_app(server, models)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        _refuse(": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"]))))
    except (ExpertierError, OSError, ValueError, RuntimeError) as error:
        _refuse(str(error))
    try:
        uvicorn.run(
            app,
            host=os.getenv("HOST", server.host),
            port=int(os.getenv("PORT", server.port)),
            ssl_keyfile=server.ssl_keyfile,
            ssl_certfile=server.ssl_certfile,
        )
    finally:
        engine = getattr(app.state, "batch_engine", None)
        if engine is not None:
            engine.close()


def _refuse(reason: str) -> NoReturn:
    print(f"expertier: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(REFUSED)


if __name__ == "__main__":
    main()
