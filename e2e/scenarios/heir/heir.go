package heir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// What the next holder of an IP tries.
const (
	OldToken       = "the earlier holder's token"
	OldConnection  = "its connection, no token"
	OldBoth        = "its connection and its token"
	OwnOnOldSocket = "its connection, the pod's own token"
)

// Attempts are all of them, in order.
var Attempts = []string{OldToken, OldConnection, OldBoth, OwnOnOldSocket}

// Result is what one pod found.
type Result struct {
	Pod, IP string
	First   sequence.Result // its first instruction
	After   string          // the pod that had the IP before; empty: none
	Gap     time.Duration   // since that one asked last
	Tried   map[string]sequence.Result
}

// estate is what a pod leaves to the next one.
type estate struct {
	Pod, Token string
	At         time.Time
	Connection Connection
}

// Pod is one that asks: its name, and what runs a function inside of its network namespace. It talks to the metadata endpoint.
type Pod struct {
	Name   string
	Inside func(func() error) error
}

// Run asks as the pod's first instruction, tries what the IP's last holder left in dir, leaves its own there and writes the result
// to dir/POD.result. limit bounds each request.
func (p Pod) Run(ctx context.Context, dir string, limit time.Duration) error {
	client, _ := p.single()
	r := Result{Pod: p.Name, First: sequence.Over(ctx, client, limit), Tried: map[string]sequence.Result{}}
	client.CloseIdleConnections()
	client, conn := p.single()
	defer client.CloseIdleConnections()
	token, err := sequence.Token(ctx, client, limit)
	if err != nil {
		return err
	}
	own := conn()
	r.IP = own.LocalAddr().(*net.TCPAddr).IP.String()
	file := filepath.Join(dir, r.IP)
	old, err := read(file)
	if err != nil {
		return err
	}
	if old != nil {
		r.After, r.Gap = old.Pod, time.Since(old.At)
		p.try(ctx, old, token, limit, r.Tried)
	}
	switch frozen, err := Freeze(own); {
	case errors.Is(err, errUnderWay): // it cannot be handed on: the next holder inherits nothing, which its result shows
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	case err != nil:
		return err
	default:
		if err := write(file, estate{Pod: p.Name, Token: token, At: time.Now(), Connection: frozen}); err != nil {
			return err
		}
	}
	return write(filepath.Join(dir, p.Name+".result"), r)
}

func (p Pod) try(ctx context.Context, old *estate, own string, limit time.Duration, tried map[string]sequence.Result) {
	fresh, _ := p.single()
	tried[OldToken] = sequence.With(ctx, fresh, limit, old.Token)
	fresh.CloseIdleConnections()
	var conn net.Conn
	if err := p.Inside(func() (err error) {
		conn, err = old.Connection.Thaw()
		return err
	}); err != nil {
		tried[OldConnection] = sequence.Result{Kind: sequence.Cut, Text: err.Error()}
		return
	}
	defer conn.Close()
	taken := false
	inherited := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		if taken {
			return nil, errors.New("the connection is no more")
		}
		taken = true
		return conn, nil
	}}}
	defer inherited.CloseIdleConnections()
	tried[OldConnection] = sequence.With(ctx, inherited, limit, "")
	tried[OldBoth] = sequence.With(ctx, inherited, limit, old.Token)
	tried[OwnOnOldSocket] = sequence.With(ctx, inherited, limit, own)
}

// single is a client that keeps one connection, and that connection.
func (p Pod) single() (*http.Client, func() *net.TCPConn) {
	var last net.Conn
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = p.Inside(func() (err error) {
			c, err = (&net.Dialer{}).DialContext(ctx, network, address)
			return err
		})
		last = c
		return c, err
	}}}, func() *net.TCPConn { return last.(*net.TCPConn) }
}

func read(file string) (*estate, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	e := &estate{}
	if err := json.Unmarshal(b, e); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return e, nil
}

// write replaces a file at once.
func write(file string, content any) error {
	b, err := json.Marshal(content)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}
