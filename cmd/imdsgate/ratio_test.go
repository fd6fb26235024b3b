package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/imdsgate/imdsgate/cache"
	"github.com/imdsgate/imdsgate/proxy"
)

const ratioServer = "IMDSGATE_RATIO_SERVER"

func TestMain(m *testing.M) {
	if kind := os.Getenv(ratioServer); kind != "" {
		if err := serveForRatio(kind); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// oneCaller is a node with one pod, and the cache with its credentials.
type oneCaller struct {
	caller proxy.Caller
}

func (o *oneCaller) Find(netip.Addr) (*proxy.Caller, error)                  { return &o.caller, nil }
func (o *oneCaller) Wait(context.Context, netip.Addr) (*proxy.Caller, error) { return &o.caller, nil }
func (o *oneCaller) Report(proxy.Pod, bool, string, string)                  {}

// issueOnce is an issuer of long sessions of a realistic size.
type issueOnce struct{}

func (issueOnce) Issue(context.Context, cache.Key) (cache.Credentials, error) {
	now := time.Now()
	return cache.NewCredentials("ASIAEXAMPLEEXAMPLE00", strings.Repeat("s", 40), strings.Repeat("t", 900), now, now.Add(time.Hour)), nil
}

// serveForRatio is one of the two processes that are compared: the endpoint with a real cache behind it, or a bare responder
// of the same headers and bytes.
func serveForRatio(kind string) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	key := cache.Key{RoleARN: "arn:aws:iam::123456789012:role/my-role", SessionName: "shop.cart@n1", Namespace: "shop", ServiceAccount: "cart", Duration: time.Hour}
	log := slog.New(slog.DiscardHandler)
	metrics := prometheus.NewRegistry()
	c := cache.New(cache.Options{
		Issuer: issueOnce{}, Encode: proxy.Encode, Rate: 10, Log: log, Metrics: metrics,
		Live: func() iter.Seq2[cache.Key, bool] { return func(yield func(cache.Key, bool) bool) { yield(key, true) } },
	})
	go func() { _ = c.Run(ctx) }()
	creds, err := c.Get(ctx, key)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	switch kind {
	case "bare":
		body := creds.Document()
		length := strconv.Itoa(len(body))
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			h := w.Header()
			h.Set("Server", "EC2ws")
			h.Set("Content-Type", "text/plain")
			h.Set("Content-Length", length)
			_, _ = w.Write(body)
		})}
		go func() { _ = s.Serve(l) }()
	case "imdsgate":
		node := &oneCaller{caller: proxy.Caller{
			Pod:   proxy.Pod{UID: "u", Namespace: "shop", Name: "cart-1", ServiceAccount: "cart"},
			Grant: &proxy.Grant{Key: key, Role: "my-role", Path: "my-role"},
		}}
		s, err := proxy.NewServer(proxy.Options{
			Callers: node, Credentials: c, Reports: node, TokenKey: []byte(strings.Repeat("k", 32)), IMDSv1: true,
			Hold: 450 * time.Millisecond, MetadataAddr: "127.0.0.1:1", Log: log, Metrics: metrics,
		})
		if err != nil {
			return err
		}
		go func() { _ = s.Serve(ctx, l) }()
	}
	fmt.Println(l.Addr())
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() { // each line asks for the CPU time spent so far
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			return err
		}
		fmt.Println(time.Duration(u.Utime.Nano() + u.Stime.Nano()).Nanoseconds())
	}
	return in.Err()
}

// ratioProcess is one of them, seen from the benchmark, with one connection kept alive.
type ratioProcess struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Scanner
	conn  net.Conn
	r     *bufio.Reader
}

func startRatioProcess(b *testing.B, kind string) *ratioProcess {
	p := &ratioProcess{cmd: exec.CommandContext(b.Context(), os.Args[0])}
	p.cmd.Env = append(os.Environ(), ratioServer+"="+kind, "GOMAXPROCS=1")
	p.cmd.Stderr = os.Stderr
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		b.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		p.stdin.Close()
		_ = p.cmd.Wait()
	})
	p.out = bufio.NewScanner(stdout)
	if !p.out.Scan() {
		b.Fatal("the server did not start")
	}
	if p.conn, err = net.Dial("tcp", p.out.Text()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.conn.Close() })
	p.r = bufio.NewReader(p.conn)
	return p
}

// cpu is the CPU time that the process has spent.
func (p *ratioProcess) cpu(b *testing.B) time.Duration {
	if _, err := fmt.Fprintln(p.stdin, "cpu"); err != nil || !p.out.Scan() {
		b.Fatal("the server ended")
	}
	n, err := strconv.ParseInt(p.out.Text(), 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return time.Duration(n)
}

// get asks n times, one after the other, and returns the CPU time per request.
func (p *ratioProcess) get(b *testing.B, n int, request []byte) time.Duration {
	before := p.cpu(b)
	for range n {
		if _, err := p.conn.Write(request); err != nil {
			b.Fatal(err)
		}
		resp, err := http.ReadResponse(p.r, nil)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
			b.Fatal(err, resp.Status)
		}
	}
	return (p.cpu(b) - before) / time.Duration(n)
}

// BenchmarkCPURatio compares the CPU time of a warm document request with that of a bare net/http responder of the same bytes:
// two processes, one kept-alive connection each, rounds in turn so that a noisy machine is noisy for both. The figure to read
// is the median of the rounds' ratios.
func BenchmarkCPURatio(b *testing.B) {
	const rounds, requests = 15, 4000
	request := []byte("GET /latest/meta-data/iam/security-credentials/my-role HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: bench\r\n\r\n")
	bare, ours := startRatioProcess(b, "bare"), startRatioProcess(b, "imdsgate")
	bare.get(b, requests, request) // warm
	ours.get(b, requests, request)
	for b.Loop() {
		var ratios, cpu []float64
		for range rounds {
			x, y := bare.get(b, requests, request), ours.get(b, requests, request)
			ratios, cpu = append(ratios, float64(y)/float64(x)), append(cpu, float64(y.Nanoseconds()))
		}
		slices.Sort(ratios)
		slices.Sort(cpu)
		b.ReportMetric(ratios[rounds/2], "cpu-ratio")
		b.ReportMetric(ratios[0], "cpu-ratio-min")
		b.ReportMetric(ratios[rounds-1], "cpu-ratio-max")
		b.ReportMetric(cpu[rounds/2], "cpu-ns/request")
	}
}
