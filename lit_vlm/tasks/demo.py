"""task=demo: a page in the browser to ask one or two models about pictures."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from lit_vlm.config import Run
from lit_vlm.tasks.serve import (
    format_url,
    list_loopback_names,
    make_service,
    make_service_options,
    open_socket,
    read_token,
    require_server,
    run_server,
)

with contextlib.suppress(ImportError):  # packages of the extra `serve`; `require_server` says so
    from lit_vlm.demo.pages import create_demo_app


def show_demo(run: Run) -> None:
    """Serve the page with the models at `init_from` and `demo.compare_with` until the process is stopped.

    Raises:
        UserError: no model is given, a package is missing, the port is in use, or a token is missing.
    """
    folders = [require_server("demo", run.init_from)]
    config, settings = run.config, run.config.serve
    if config.demo.compare_with is not None:
        folders.append(config.demo.compare_with)
    token = read_token(settings.host)
    with open_socket(settings.host, settings.port) as listening:
        options = make_service_options(config.trainer, config.data, config.seed)
        services = [
            make_service(folder, replace(settings, model_name=name), config.model, token, **options)
            for folder, name in zip(folders, (settings.model_name, None), strict=False)
        ]
        hosts = list_loopback_names(settings.host) if token is None else None
        app = create_demo_app(services, folders, hosts, config.language.value)
        names = " and ".join(service.reader.model_name for service in services)
        run_server(app, services, listening, f"{names}: open {format_url(listening)} in a browser. Ctrl-C ends it.")
