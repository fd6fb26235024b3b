// Command bare is what the daemon is compared with: as little as a net/http server can do. It answers the paths of a table with
// fixed headers and bytes, and anything else with 404. The table is read from standard input; "ready" is written once it listens.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
)

// Answers are by path.
type Answers map[string]Answer

// Answer is headers and a body.
type Answer struct {
	Header http.Header
	Body   []byte
}

func (a Answers) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer, ok := a[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	h := w.Header()
	for name, values := range answer.Header {
		h[name] = values
	}
	_, _ = w.Write(answer.Body) // fails only when the client has left
}

func run() error {
	addr := flag.String("addr", "", "address to listen on")
	flag.Parse()
	var answers Answers
	if err := json.NewDecoder(os.Stdin).Decode(&answers); err != nil {
		return fmt.Errorf("read the answers: %w", err)
	}
	l, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return http.Serve(l, answers)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bare:", err)
		os.Exit(1)
	}
}
