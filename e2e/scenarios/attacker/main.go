// Command attacker is what hostile pods of the scenarios run. It attacks as package hostile says and writes JSON.
//
//	attacker requests ADDRESS NAMES [N]  the corpus of hostile.Requests about the NAMES (JSON), or its first N; writes the outcome
//	attacker packets PLACE               hostile.Packets of the PLACE (JSON), over the link; writes how many were sent
//	attacker flood NAME DURATION         one of hostile.Floods; writes what it came to
//	attacker say ADDRESS TEXT            writes what the text is answered; tls://ADDRESS: over TLS, whoever answers
//	attacker listen PORT                 greets whoever connects, and writes who does
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/e2e/hostile"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "attacker:", err)
		os.Exit(1) //nolint:forbidigo // a main of its own
	}
}

// greeting is what a listener says, for who takes it for something else.
const greeting = "HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nmallory"

func run(ctx context.Context, args []string) error {
	// The machine that builds it may have a real metadata endpoint: this runs at its place in the image and nowhere else.
	if self, err := os.Executable(); err != nil || self != "/attacker" || os.Getenv("KUBERNETES_SERVICE_HOST") == "" {
		return errors.New("this is not a pod")
	}
	out := json.NewEncoder(os.Stdout)
	switch {
	case (len(args) == 3 || len(args) == 4) && args[0] == "requests":
		var names hostile.Names
		if err := json.Unmarshal([]byte(args[2]), &names); err != nil {
			return err
		}
		requests := hostile.Requests(names)
		if len(args) == 4 {
			n, err := strconv.Atoi(args[3])
			if err != nil {
				return err
			}
			requests = requests[:min(n, len(requests))]
		}
		return out.Encode(hostile.Try(ctx, dialer(args[1]), requests, names.Node))
	case len(args) == 2 && args[0] == "packets":
		var place hostile.Place
		if err := json.Unmarshal([]byte(args[1]), &place); err != nil {
			return err
		}
		link, err := hostile.OpenLink()
		if err != nil {
			return err
		}
		defer link.Close()
		packets := hostile.Packets(place)
		for _, p := range packets {
			if err := link.Send(p); err != nil {
				return err
			}
		}
		return out.Encode(len(packets))
	case len(args) == 3 && args[0] == "flood":
		d, err := time.ParseDuration(args[2])
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		flooded, err := hostile.Flood(ctx, args[1])
		if err != nil {
			return err
		}
		return out.Encode(flooded)
	case len(args) == 3 && args[0] == "say":
		c, err := dialer(args[1])(ctx)
		if err != nil {
			return err
		}
		answer, err := hostile.Speak(c, args[2])
		if err != nil {
			return err
		}
		return out.Encode(answer)
	case len(args) == 2 && args[0] == "listen":
		ln, err := net.Listen("tcp", ":"+args[1])
		if err != nil {
			return err
		}
		for {
			c, err := ln.Accept()
			if err != nil {
				return err
			}
			if err := out.Encode(c.RemoteAddr().String()); err != nil {
				return err
			}
			_, _ = io.WriteString(c, greeting)
			_ = c.Close()
		}
	}
	return fmt.Errorf("what is %q? see the source", args)
}

// dialer connects to an address, which may begin with tls://.
func dialer(address string) func(context.Context) (net.Conn, error) {
	d := &net.Dialer{Timeout: 2 * time.Second}
	if to, ok := strings.CutPrefix(address, "tls://"); ok {
		return func(ctx context.Context) (net.Conn, error) {
			return (&tls.Dialer{NetDialer: d, Config: &tls.Config{InsecureSkipVerify: true}}).DialContext(ctx, "tcp", to) //nolint:gosec // whoever answers
		}
	}
	return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
}
