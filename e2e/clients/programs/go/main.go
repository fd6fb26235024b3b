// Command go runs one of the Go clients (its only argument names it) under the output contract of
// package clients.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// credentials is what a fetch got. arn is who STS says they are, where the client asked.
type credentials struct {
	accessKeyID string
	expiration  time.Time
	arn         string
}

// fetch gets credentials anew: from the metadata endpoint, not from the client's cache.
type fetch func() (credentials, error)

type line struct {
	Client      string  `json:"client"`
	OK          bool    `json:"ok"`
	AccessKeyID string  `json:"access_key_id"`
	Expiration  string  `json:"expiration"`
	Seconds     float64 `json:"seconds"`
	Error       string  `json:"error"`
	ARN         string  `json:"arn,omitempty"`
}

func main() {
	clients := map[string]func() (fetch, error){"go-v1": sdkV1, "go-v2": sdkV2, "minio-go": minio}
	if len(os.Args) != 2 || clients[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: go go-v1|go-v2|minio-go")
		os.Exit(2)
	}
	timeout := 20 * time.Second
	if s, err := time.ParseDuration(os.Getenv("FETCH_TIMEOUT") + "s"); err == nil {
		timeout = s
	}
	get, err := clients[os.Args[1]]()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for in := bufio.NewScanner(os.Stdin); ; {
		run(os.Args[1], timeout, get)
		if !in.Scan() {
			return
		}
	}
}

// run fetches once and prints the line; a fetch that does not end is reported and ends with 3.
func run(client string, timeout time.Duration, get fetch) {
	out := json.NewEncoder(os.Stdout)
	watchdog := time.AfterFunc(timeout, func() {
		_ = out.Encode(line{Client: client, Seconds: timeout.Seconds(), Error: "hang: no result within " + timeout.String()})
		os.Exit(3)
	})
	start := time.Now()
	c, err := get()
	watchdog.Stop()
	l := line{Client: client, OK: err == nil, AccessKeyID: c.accessKeyID, ARN: c.arn, Seconds: float64(time.Since(start).Milliseconds()) / 1e3}
	if err != nil {
		l.Error = err.Error()
	} else {
		l.Expiration = c.expiration.UTC().Format(time.RFC3339)
	}
	_ = out.Encode(l)
}
