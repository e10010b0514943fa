"""HTTP/1.1 and nothing else: uvicorn's protocol for clients that offer to go on in another one."""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Http1Protocol(HttpToolsProtocol):
    """Ignores ``Upgrade`` (RFC 9110 7.8), which Java's HTTP client and ``curl --http2`` send with a request.

    For httptools such a request ends with its head, and what follows is no HTTP: its body would be lost. So uvicorn is
    made to leave that request alone, and its head is parsed once more without the offer, then what follows it.
    """

    def _should_upgrade(self) -> bool:
        return True  # uvicorn asks this of offers only, and then starts nothing

    def data_received(self, data: bytes | memoryview) -> None:
        self._unset_keepalive_if_required()
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as offer:
                    head = self._head_without_offer()
                    data = memoryview(data)[offer.args[0] :]
                # Another one: after a request that wants the connection closed the old one reads nothing more.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                self.parser.feed_data(head)
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)

    def _head_without_offer(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":  # asks for a tunnel, without any header that could be left out
            raise httptools.HttpParserError("this is no proxy")
        lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"
