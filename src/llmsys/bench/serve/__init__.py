"""Serving under load: who answers (`servers`), what is asked when (`load`), a client that keeps what came when
(`client`), and what that says (`figures`)."""
