package hostile

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const endpoint = "169.254.169.254:80"

// floods are loops, each on its own connection.
var floods = map[string]struct {
	connections int
	loop        func(c net.Conn) error // once; an error ends the connection, and the next is opened
}{
	"connections": {2000, func(c net.Conn) error {
		_, err := io.Copy(io.Discard, c)
		time.Sleep(20 * time.Millisecond) // of each of the 2,000
		return fmt.Errorf("closed: %w", err)
	}},
	"connect and close": {64, func(net.Conn) error { return io.EOF }},
	"401 loop": {64, func(c net.Conn) error {
		return exchange(c, "GET "+list+"/ HTTP/1.1\r\n"+host+session+"bad\r\n\r\n")
	}},
	"404 loop": {256, func(c net.Conn) error { return exchange(c, get("/latest/user-data")) }},
	"PUT flood": {256, func(c net.Conn) error {
		return exchange(c, "PUT /latest/api/token"+v1+host+ttl+"21600\r\nContent-Length: 0\r\n\r\n")
	}},
	"hits": {256, func(c net.Conn) error { return exchange(c, get(list+"/")) }},
	"slow heads": {512, func(c net.Conn) error {
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nX: "); err != nil {
			return err
		}
		for range 100 {
			if _, err := io.WriteString(c, "x"); err != nil {
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
		return io.EOF
	}},
	"huge heads": {64, func(c net.Conn) error {
		_, err := io.WriteString(c, "GET / HTTP/1.1\r\nX: "+strings.Repeat("x", 1<<20)+"\r\n\r\n")
		return err
	}},
	"heads of 12 KiB that never end": {512, func(c net.Conn) error {
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nX: "+strings.Repeat("x", 12<<10)); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, c)
		return fmt.Errorf("closed: %w", err)
	}},
}

// Floods are the names of what Flood does.
func Floods() []string { return slices.Sorted(maps.Keys(floods)) }

// Flooded is what a flood came to.
type Flooded struct {
	AtOnce      int   // connections that it keeps opening
	Connections int64 // opened in all
	Rounds      int64 // on them, such as requests that were answered
}

// Flood floods the endpoint until ctx is done.
func Flood(ctx context.Context, name string) (Flooded, error) {
	f, ok := floods[name]
	if !ok {
		return Flooded{}, fmt.Errorf("there is no flood %q", name)
	}
	var connections, rounds atomic.Int64
	var wg sync.WaitGroup
	for range f.connections {
		wg.Go(func() {
			for ctx.Err() == nil {
				c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", endpoint)
				if err != nil {
					continue
				}
				connections.Add(1)
				stop := context.AfterFunc(ctx, func() { _ = c.Close() })
				for err = f.loop(c); err == nil; err = f.loop(c) {
					rounds.Add(1)
				}
				stop()
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	return Flooded{AtOnce: f.connections, Connections: connections.Load(), Rounds: rounds.Load()}, nil
}

func exchange(c net.Conn, request string) error {
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.Close {
		return io.EOF
	}
	return nil
}
