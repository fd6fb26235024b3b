package growth

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/imdsgate/imdsgate/e2e/lab"
)

// relay passes TCP connections of a node on to the API server and counts what goes by: TLS and HTTP framing included, as
// the network sees it.
type relay struct {
	sent, received, conns atomic.Int64 // by the daemon

	ln    net.Listener
	node  *lab.Node
	to    string
	tasks sync.WaitGroup
	mu    sync.Mutex
	open  map[net.Conn]struct{}
}

// startRelay makes a relay, and a kubeconfig that leads through it.
func startRelay(ctx context.Context, n *lab.Node) (_ *relay, kubeconfig string, err error) {
	config, err := clientcmd.LoadFromFile(n.Kubeconfig())
	if err != nil {
		return nil, "", err
	}
	r := &relay{node: n, open: make(map[net.Conn]struct{})}
	if r.ln, err = n.Net.Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
		return nil, "", err
	}
	for _, c := range config.Clusters {
		r.to = c.Server[len("https://"):]
		c.Server = "https://" + r.ln.Addr().String()
	}
	kubeconfig = filepath.Join(n.Dir(), fmt.Sprintf("kubeconfig-%d", r.ln.Addr().(*net.TCPAddr).Port))
	r.tasks.Go(r.accept)
	return r, kubeconfig, clientcmd.WriteToFile(*config, kubeconfig)
}

func (r *relay) accept() {
	for {
		c, err := r.ln.Accept()
		if err != nil {
			return
		}
		r.conns.Add(1)
		r.tasks.Go(func() { r.pass(c) })
	}
}

func (r *relay) pass(daemon net.Conn) {
	defer daemon.Close()
	server, err := r.node.Net.Dial(context.Background(), "tcp", r.to)
	if err != nil {
		return
	}
	defer server.Close()
	if !r.hold(daemon, server) {
		return
	}
	defer r.release(daemon, server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(counted{server, &r.sent}, daemon)
		server.Close()
	}()
	io.Copy(counted{daemon, &r.received}, server)
	daemon.Close()
	<-done
}

// hold notes connections to close with the relay. It is false when that has happened.
func (r *relay) hold(conns ...net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open == nil {
		return false
	}
	for _, c := range conns {
		r.open[c] = struct{}{}
	}
	return true
}

func (r *relay) release(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range conns {
		delete(r.open, c)
	}
}

// close cuts every connection and returns when nothing is left.
func (r *relay) close() {
	r.ln.Close()
	r.mu.Lock()
	for c := range r.open {
		c.Close()
	}
	r.open = nil
	r.mu.Unlock()
	r.tasks.Wait()
}

// counted is a writer that counts.
type counted struct {
	net.Conn
	n *atomic.Int64
}

func (c counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.n.Add(int64(n))
	return n, err
}

// ReadFrom hides the connection's own, which the count would not see.
func (c counted) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{c}, r)
}
