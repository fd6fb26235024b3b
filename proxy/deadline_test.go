package proxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// counted counts how often a deadline is set on the socket.
type counted struct {
	net.Conn
	reads, writes int
}

func (c *counted) SetReadDeadline(t time.Time) error {
	c.reads++
	return c.Conn.SetReadDeadline(t)
}

func (c *counted) SetWriteDeadline(t time.Time) error {
	c.writes++
	return c.Conn.SetWriteDeadline(t)
}

func piped(t *testing.T, test func(t *testing.T, c *conn, socket *counted, peer net.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer near.Close()
		defer far.Close()
		socket := &counted{Conn: near}
		test(t, &conn{Conn: socket}, socket, far)
	})
}

// passes reads, and complains unless the deadline passes after so long.
func passes(t *testing.T, c *conn, after time.Duration) {
	t.Helper()
	start := time.Now()
	n, err := c.Read(make([]byte, 1))
	if took := time.Since(start); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) || took != after {
		t.Errorf("Read: %d, %v after %v, want the deadline after %v", n, err, took, after)
	}
}

func after(d time.Duration) time.Time { return time.Now().Add(d) }

func TestReadDeadlines(t *testing.T) {
	t.Run("set", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			_ = c.SetReadDeadline(after(5 * time.Second))
			passes(t, c, 5*time.Second)
			passes(t, c, 0)
		})
	})
	t.Run("moved later", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			_ = c.SetReadDeadline(after(5 * time.Second))
			_ = c.SetReadDeadline(after(75 * time.Second))
			passes(t, c, 75*time.Second)
		})
	})
	t.Run("moved earlier", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			_ = c.SetReadDeadline(after(75 * time.Second))
			_ = c.SetReadDeadline(after(500 * time.Millisecond))
			passes(t, c, 500*time.Millisecond)
		})
	})
	t.Run("moved while a read waits", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			_ = c.SetReadDeadline(after(5 * time.Second))
			time.AfterFunc(time.Second, func() { _ = c.SetReadDeadline(after(time.Second)) })
			passes(t, c, 2*time.Second)
		})
	})
	t.Run("removed", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, peer net.Conn) {
			_ = c.SetReadDeadline(after(5 * time.Second))
			_ = c.SetReadDeadline(time.Time{})
			time.AfterFunc(time.Hour, func() { _, _ = peer.Write([]byte("x")) })
			if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
				t.Errorf("Read: %d, %v", n, err)
			}
		})
	})
	t.Run("interrupted", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			time.AfterFunc(time.Second, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
			passes(t, c, time.Second)
			_ = c.SetReadDeadline(time.Time{})
			_ = c.SetReadDeadline(after(75 * time.Second))
			passes(t, c, 75*time.Second)
		})
	})
}

// A peer that reads nothing is given up at the deadline that is meant; one that reads slowly gets all of it.
func TestWriteDeadlines(t *testing.T) {
	piped(t, func(t *testing.T, c *conn, _ *counted, peer net.Conn) {
		_ = c.SetWriteDeadline(after(10 * time.Second))
		_ = c.SetWriteDeadline(after(15 * time.Second))
		go func() {
			time.Sleep(12 * time.Second)
			_, _ = peer.Read(make([]byte, 2)) // half of it
		}()
		start := time.Now()
		n, err := c.Write([]byte("four"))
		if took := time.Since(start); n != 2 || !errors.Is(err, os.ErrDeadlineExceeded) || took != 15*time.Second {
			t.Errorf("Write: %d, %v after %v, want half of it and the deadline after 15s", n, err, took)
		}
	})
}

// What net/http does with the deadlines of a connection that is kept alive touches the socket for the interruption of a read alone.
func TestDeadlinesAreCheap(t *testing.T) {
	piped(t, func(t *testing.T, c *conn, socket *counted, peer net.Conn) {
		const requests = 100
		go func() {
			for range requests {
				time.Sleep(time.Millisecond)
				_, _ = peer.Write([]byte("x"))
			}
		}()
		for range requests {
			_ = c.SetReadDeadline(time.Time{})
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Time{})
			_ = c.SetReadDeadline(after(readHeaderTimeout))
			_ = c.SetReadDeadline(time.Time{})
			_ = c.SetReadDeadline(interrupt())
			_ = c.SetReadDeadline(time.Time{})
		}
		if socket.reads > 2*requests || socket.writes != 0 {
			t.Errorf("%d requests set %d read and %d write deadlines", requests, socket.reads, socket.writes)
		}
	})
}

func nobody() CallerFinder { return newCallers() }

// servePipe serves one connection under fake time, and holds requests for 20 s.
func servePipe(t *testing.T, callers func() CallerFinder, client func(peer net.Conn, br *bufio.Reader)) (socket *counted) {
	synctest.Test(t, func(t *testing.T) {
		s, err := NewServer(Options{Callers: callers(), Credentials: noCredentials{}, TokenKey: make([]byte, 32), IMDSv1: true, Hold: 20 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		near, far := net.Pipe()
		socket = &counted{Conn: near}
		c := &conn{Conn: socket, shares: newShares(1, 1)}
		c.shares.acquire(c, podIPs["role"], time.Now())
		hs, done := s.httpServer(), make(chan struct{})
		go func() { _ = hs.Serve(&oneConn{conn: c, done: done}) }()
		client(far, bufio.NewReader(far))
		close(done)
		_ = hs.Close()
		_ = far.Close()
	})
	return socket
}

// What net/http sets no deadline for ends all the same, at most a look later.
func TestIdleAndStuck(t *testing.T) {
	const ask = "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"
	serve := func(t *testing.T, client func(peer net.Conn, br *bufio.Reader)) { servePipe(t, nobody, client) }
	answered := func(t *testing.T, peer net.Conn, br *bufio.Reader) {
		t.Helper()
		go func() { _, _ = io.WriteString(peer, ask) }()
		if r, err := readReply(br, "GET"); err != nil || r.StatusCode != 200 {
			t.Fatalf("%v, %v", r, err)
		}
	}
	closed := func(t *testing.T, peer io.Reader, atLeast, atMost time.Duration) {
		t.Helper()
		start := time.Now()
		n, err := peer.Read(make([]byte, 1))
		if took := time.Since(start); n != 0 || !errors.Is(err, io.EOF) || took < atLeast || took > atMost {
			t.Errorf("read %d, %v after %v, want the end after %v to %v", n, err, took, atLeast, atMost)
		}
	}
	t.Run("nothing", func(t *testing.T) {
		serve(t, func(peer net.Conn, br *bufio.Reader) { closed(t, br, readHeaderTimeout, readHeaderTimeout) })
	})
	t.Run("no further request", func(t *testing.T) {
		serve(t, func(peer net.Conn, br *bufio.Reader) {
			for range 10 { // none of the pauses is too long
				answered(t, peer, br)
				time.Sleep(idleTimeout - time.Second)
			}
			answered(t, peer, br)
			closed(t, br, idleTimeout, idleTimeout+look)
		})
	})
	t.Run("no whole request", func(t *testing.T) {
		serve(t, func(peer net.Conn, br *bufio.Reader) {
			answered(t, peer, br)
			time.Sleep(time.Minute)
			_, _ = io.WriteString(peer, ask[:len(ask)-5])
			closed(t, br, readHeaderTimeout, readHeaderTimeout)
		})
	})
	t.Run("not a word", func(t *testing.T) {
		serve(t, func(peer net.Conn, br *bufio.Reader) {
			answered(t, peer, br)
			go func() { _, _ = io.WriteString(peer, "GE") }()
			closed(t, br, idleTimeout, idleTimeout+look)
		})
	})
	t.Run("the rest of a body that net/http refused", func(t *testing.T) {
		serve(t, func(peer net.Conn, br *bufio.Reader) {
			go func() {
				_, _ = io.WriteString(peer, strings.Replace(ask, "\r\n\r\n", "\r\nExpect: x\r\nContent-Length: 5\r\n\r\n", 1))
			}()
			if r, err := readReply(br, "GET"); err != nil || r.StatusCode != 417 {
				t.Fatalf("%v, %v", r, err)
			}
			closed(t, br, idleTimeout, idleTimeout+look)
		})
	})
	t.Run("a request that is held", func(t *testing.T) {
		serve(t, func(peer net.Conn, br *bufio.Reader) {
			answered(t, peer, br)
			time.Sleep(idleTimeout - time.Second)
			start := time.Now()
			go func() { _, _ = io.WriteString(peer, strings.Replace(ask, "/", roleList, 1)) }()
			if r, err := readReply(br, "GET"); err != nil || r.StatusCode != 503 || time.Since(start) != 20*time.Second {
				t.Errorf("%v, %v after %v", r, err, time.Since(start))
			}
		})
	})
	t.Run("nobody reads", func(t *testing.T) {
		serve(t, func(peer net.Conn, br *bufio.Reader) {
			answered(t, peer, br)
			_, _ = io.WriteString(peer, ask)
			time.Sleep(writeTimeout - time.Second)
			first := make([]byte, 1)
			if _, err := peer.Read(first); err != nil {
				t.Errorf("after %v: %v", writeTimeout-time.Second, err)
			}
			time.Sleep(look + 2*time.Second)
			if rest, err := io.ReadAll(peer); len(rest) > 0 || err != nil {
				t.Errorf("%q, %v", rest, err)
			}
		})
	})
}

// A connection that is closed is looked after no more, whatever is set then.
func TestDeadlinesEnd(t *testing.T) {
	piped(t, func(t *testing.T, c *conn, socket *counted, _ net.Conn) {
		_ = c.SetReadDeadline(after(time.Second))
		_ = c.Close()
		_ = c.SetWriteDeadline(after(time.Second))
		time.Sleep(time.Minute)
		if socket.reads+socket.writes != 0 || c.deadlines.timer != nil {
			t.Error("a timer still runs")
		}
	})
}
