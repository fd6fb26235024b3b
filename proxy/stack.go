package proxy

import "net"

// RemoteAddr implements net.Conn. It is the first that net/http calls in a connection's goroutine, whose stack of 2 KiB would be
// copied twice on the way to the 8 KiB that an answer of net/http needs, the first time deep in the handler. Here there is nothing on
// the stack yet, and one step is enough. If net/http began otherwise, nothing would be wrong, but a request on a new connection would
// cost more again: with deadline.go it went from 113,000 instructions to 89,000 (callgrind), a bare responder's needs 87,000.
func (c *conn) RemoteAddr() net.Addr {
	reserveStack(0)
	return c.Conn.RemoteAddr()
}

// reserveStack has a frame of more than 4 KiB, of which with 0 nothing is touched.
//
//go:noinline
func reserveStack(n int) byte {
	if n == 0 {
		return 0
	}
	var frame [4 << 10]byte
	frame[n%len(frame)]++
	return frame[0]
}
