// Command fabric stands for the cloud around a cluster's nodes: their real metadata endpoint, AWS, the resolver of their
// network, and a way from the machine's loopback to the API server. It belongs into the control plane's network namespace,
// enters it by itself, and refuses to be anywhere else.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/cluster/control"
	"github.com/imdsgate/imdsgate/e2e/imds"
)

type config struct {
	netns, cert, key, ca string
	socket, apiFile      string
	apiFD                int
	machine              string // namespace where the process started
}

func main() {
	var c config
	flag.StringVar(&c.netns, "netns", "", "file of the control plane's network namespace")
	flag.StringVar(&c.cert, "cert", "", "certificate of AWS")
	flag.StringVar(&c.key, "key", "", "its key")
	flag.StringVar(&c.ca, "ca", "", "authority of the API server")
	flag.StringVar(&c.socket, "socket", "", "unix socket for tests")
	flag.StringVar(&c.apiFile, "api", "", "file for the loopback address that leads to the API server")
	flag.IntVar(&c.apiFD, "api-fd", 0, "set by the process itself")
	flag.StringVar(&c.machine, "machine", "", "set by the process itself")
	flag.Parse()
	if err := c.main(); err != nil {
		slog.Error("fabric", "error", err)
		os.Exit(1)
	}
}

func (c config) main() error {
	if c.apiFD == 0 {
		return c.enter()
	}
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	first, err := os.Readlink("/proc/1/ns/net") // in a container it may not be shown
	if here == c.machine || err == nil && here == first {
		return errors.New("this is the machine's own network namespace: its metadata endpoint may be a real one")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return c.run(ctx)
}

// enter listens on the machine's loopback, and becomes the fabric in its own namespace with that socket.
func (c config) enter() error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil {
		return err
	}
	if err := os.WriteFile(c.apiFile, []byte(ln.Addr().String()), 0o644); err != nil {
		return err
	}
	machine, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return err
	}
	argv := append([]string{"nsenter", "--net=" + c.netns, "--", self, fmt.Sprintf("-api-fd=%d", f.Fd()), "-machine=" + machine}, os.Args[1:]...)
	return syscall.Exec(nsenter, argv, os.Environ())
}

func (c config) run(ctx context.Context) error {
	api, err := net.FileListener(os.NewFile(uintptr(c.apiFD), "api"))
	if err != nil {
		return err
	}
	provider := control.Provider()
	if provider.Keys, err = c.keys(); err != nil {
		return err
	}
	server, err := aws.New(aws.Options{
		Region: control.Region, Buckets: []string{"ledger", "pictures"}, Groups: []string{"admins", "auditors"},
		NodeRoleARN: control.NodeRoleARN,
		Roles:       []aws.Role{{ARN: control.NodeRoleARN, Allow: []string{"*"}}}, // whoever had it would notice
		Providers:   []aws.Provider{provider},
	})
	if err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return err
	}
	endpoint := &aws.Endpoint{
		Handler: server, TLS: &tls.Config{Certificates: []tls.Certificate{cert}},
		Listen: func() (net.Listener, error) { return listen(ctx, control.AWS, 443) },
	}
	metadata := imds.New()
	ctl := control.NewServer(server, endpoint, metadata)
	metadata.Credentials = ctl.NodeCredentials
	if err := metadata.Capture("br0"); err != nil {
		return err
	}
	defer metadata.Close()
	if err := endpoint.Start(); err != nil {
		return err
	}
	defer endpoint.Kill()

	g, ctx := errgroup.WithContext(ctx)
	serve := func(ln net.Listener, f func(net.Listener) error) {
		context.AfterFunc(ctx, func() { ln.Close() })
		g.Go(func() error {
			if err := f(ln); !errors.Is(err, net.ErrClosed) {
				return err
			}
			return nil
		})
	}
	for _, ip := range []netip.Addr{imds.IPv4, imds.IPv6} {
		ln, err := listen(ctx, ip, 80)
		if err != nil {
			return err
		}
		serve(ln, metadata.Serve)
	}
	names, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(control.Resolver, 53)))
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { names.Close() })
	g.Go(func() error { return resolve(names) })
	serve(api, forward)
	// The socket comes last: who sees it may use all the rest.
	os.Remove(c.socket)
	socket, err := net.Listen("unix", c.socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(c.socket, 0o600); err != nil {
		return err
	}
	serve(socket, (&http.Server{Handler: ctl, ReadHeaderTimeout: 5 * time.Second}).Serve)
	slog.Info("the fabric is up", "api", api.Addr().String())
	return g.Wait()
}

func listen(ctx context.Context, ip netip.Addr, port uint16) (net.Listener, error) {
	return (&net.ListenConfig{}).Listen(ctx, "tcp", netip.AddrPortFrom(ip, port).String())
}

// keys fetches the public keys of service account tokens, as AWS does from a cluster's OIDC endpoint.
func (c config) keys() (func(context.Context) ([]byte, error), error) {
	pem, err := os.ReadFile(c.ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", c.ca)
	}
	client := &http.Client{
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}, Timeout: 5 * time.Second,
	}
	return func(ctx context.Context) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, control.APIServer+"/openid/v1/jwks", nil)
		if err != nil {
			return nil, err
		}
		resp, err := client.Do(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("the API server says %s: %.200s", resp.Status, body)
		}
		return body, err
	}, nil
}

// forward joins every connection to one to the API server.
func forward(ln net.Listener) error {
	for {
		in, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer in.Close()
			out, err := net.DialTimeout("tcp", control.APIServer[len("https://"):], 5*time.Second)
			if err != nil {
				return
			}
			defer out.Close()
			go func() {
				io.Copy(out, in)
				out.(*net.TCPConn).CloseWrite()
			}()
			io.Copy(in, out)
		}()
	}
}
