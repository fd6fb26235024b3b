package proxy

import "net"

// RemoteAddr implements net.Conn. It is the first that net/http calls in a connection's goroutine, whose stack of 2 KiB would be
// copied twice on the way to the 8 KiB that an answer of net/http needs, the first time deep in the handler: a tenth of what a
// request on a new connection costs. Here there is nothing on the stack yet, and one step is enough.
func (c *conn) RemoteAddr() net.Addr {
	reserveStack(0)
	return c.Conn.RemoteAddr()
}

// reserveStack has a frame of more than 4 KiB, of which with 0 nothing is touched.
//
//go:noinline
func reserveStack(n int) (sum byte) {
	if n != 0 {
		var frame [4 << 10]byte
		for i := range n {
			frame[i]++
		}
		sum = frame[n-1]
	}
	return sum
}
