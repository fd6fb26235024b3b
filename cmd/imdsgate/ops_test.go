package main

import (
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// pipeListener accepts what is sent to it.
type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) {
	c, ok := <-l
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (l pipeListener) Close() error { close(l); return nil }

func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// Whoever does not read the answer, or does not send the body that was announced, holds neither a scrape nor a connection for ever.
func TestOpsServerGivesUp(t *testing.T) {
	for name, request := range map[string]string{
		"reads nothing": "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"sends nothing": "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ended := make(chan time.Time, 1)
				s := opsServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.Copy(io.Discard, r.Body)
					_, _ = w.Write(make([]byte, 1<<20))
					ended <- time.Now()
				}))
				l := make(pipeListener, 1)
				go func() { _ = s.Serve(l) }()
				near, far := net.Pipe()
				defer near.Close()
				l <- far
				start := time.Now()
				if _, err := near.Write([]byte(request)); err != nil {
					t.Fatal(err)
				}
				if took := (<-ended).Sub(start); took > time.Minute {
					t.Errorf("it was waited for %v", took)
				}
				_ = s.Close()
			})
		})
	}
}
