"""The wire contract between trainer and generator, and the weight store that they share.

This package never imports torch, so the command line, the mock generator and your own tools can use it anywhere.

- [`messages`][tandem_protocol.messages]: requests and answers. Start here.
- [`errors`][tandem_protocol.errors]: every error that crosses the wire, with its HTTP status and retry advice.
- [`version`][tandem_protocol.version]: the name of a policy version, `step.attempt`.
- [`store`][tandem_protocol.store] and [`manifest`][tandem_protocol.manifest]: policy versions on the shared volume.
- [`config`][tandem_protocol.config]: loads `config.yaml` and its overrides.
"""
