package aws

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"
)

// Hosts are the names under which SDKs and CLIs look for these services in a region, for a hosts file and a certificate.
func Hosts(region string) []string {
	return []string{
		"sts." + region + ".amazonaws.com", "sts.amazonaws.com",
		"s3." + region + ".amazonaws.com", "s3.amazonaws.com",
		"iam.amazonaws.com",
	}
}

// Certificate makes an authority and a server certificate for hosts (names or addresses), valid from an hour ago for a day.
// The authority is returned in PEM: what AWS_CA_BUNDLE wants.
func Certificate(hosts ...string) (server tls.Certificate, authority []byte, err error) {
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "imdsgate lab AWS authority"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "imdsgate lab AWS"},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			leaf.IPAddresses = append(leaf.IPAddresses, ip)
		} else {
			leaf.DNSNames = append(leaf.DNSNames, h)
		}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return server, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return server, nil, err
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return server, nil, fmt.Errorf("certificate of the authority: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	if err != nil {
		return server, nil, fmt.Errorf("certificate of the server: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), nil
}

// Endpoint serves a handler on a listener that can die and come back at the same address. It is safe for concurrent use.
type Endpoint struct {
	Handler http.Handler
	// Listen opens the listener, in whatever network namespace it belongs to.
	Listen func() (net.Listener, error)
	TLS    *tls.Config // nil: plain HTTP

	mu     sync.Mutex
	server *http.Server
	served chan error
}

// Start listens and serves until Kill.
func (e *Endpoint) Start() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.server != nil {
		return errors.New("the endpoint is up already")
	}
	l, err := e.Listen()
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if e.TLS != nil {
		l = tls.NewListener(l, e.TLS)
	}
	e.server = &http.Server{Handler: e.Handler, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	e.served = make(chan error, 1)
	go func(s *http.Server, served chan<- error) { served <- s.Serve(l) }(e.server, e.served)
	return nil
}

// Kill closes the listener and every connection: from now on connections are refused, as with a service that is gone.
func (e *Endpoint) Kill() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.server == nil {
		return nil
	}
	err := e.server.Close()
	if served := <-e.served; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	e.server = nil
	return err
}

// Run is Start, and Kill when ctx is done.
func (e *Endpoint) Run(ctx context.Context) error {
	if err := e.Start(); err != nil {
		return err
	}
	<-ctx.Done()
	return e.Kill()
}
