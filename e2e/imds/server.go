package imds

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Mark is part of every value that belongs to the node alone.
const Mark = "FOR-THE-NODE-ALONE"

// Addresses of the endpoint.
var (
	IPv4 = netip.MustParseAddr("169.254.169.254")
	IPv6 = netip.MustParseAddr("fd00:ec2::254")
)

// Credentials of a node role.
type Credentials struct {
	Role                                       string
	AccessKeyID, SecretAccessKey, SessionToken string
	Expires                                    time.Time
}

// Request is one HTTP request that reached the endpoint.
type Request struct {
	Time   time.Time
	Source netip.Addr
	Local  netip.AddrPort // of the endpoint
	Method string
	Target string // as received
	Header http.Header
	Status int // of the answer
}

func (r Request) String() string {
	return fmt.Sprintf("%s %s %s to %s: %d", r.Source, r.Method, r.Target, r.Local, r.Status)
}

// Server is the endpoint. It is safe for concurrent use.
type Server struct {
	// Credentials are the node role's, by the node's address. Nil: the instance has no role.
	Credentials func(node netip.Addr) (Credentials, bool)

	mu       sync.Mutex
	hopLimit int
	requests []Request
	tokens   map[string]time.Time // by token: its end
	tree     map[string]string
	capture  *capture
}

// New returns an endpoint with the tree of an ordinary instance.
func New() *Server {
	return &Server{hopLimit: 2, tokens: map[string]time.Time{}, tree: maps.Clone(instance)}
}

// instance is below /latest/. Values that are nobody's business but the node's hold Mark.
var instance = map[string]string{
	"user-data": "#!/bin/sh\n# " + Mark + "\n/etc/eks/bootstrap.sh --b64-cluster-ca " + Mark + "\n",

	"dynamic/instance-identity/document":  `{"accountId":"123456789012","instanceId":"i-0123456789abcdef0","region":"us-east-1","imageId":"ami-0abcdef1234567890"}`,
	"dynamic/instance-identity/pkcs7":     "MIAGCSqGSIb3DQEHAqCAMIACAQExCzAJ" + Mark,
	"dynamic/instance-identity/signature": "dExamplESjNQhhJan7pORLpLSr7lJEF4" + Mark,
	"dynamic/instance-identity/rsa2048":   "MIAGCSqGSIb3DQEHAqCAMIACAQExDzAN" + Mark,

	"meta-data/ami-id":                                                    "ami-0abcdef1234567890",
	"meta-data/ami-manifest-path":                                         "(unknown)",
	"meta-data/hostname":                                                  "ip-172-30-0-11.ec2.internal",
	"meta-data/instance-action":                                           "none",
	"meta-data/instance-id":                                               "i-0123456789abcdef0",
	"meta-data/instance-life-cycle":                                       "on-demand",
	"meta-data/instance-type":                                             "m5.large",
	"meta-data/local-hostname":                                            "ip-172-30-0-11.ec2.internal",
	"meta-data/local-ipv4":                                                "172.30.0.11",
	"meta-data/mac":                                                       "0e:49:61:0f:c3:11",
	"meta-data/placement/availability-zone":                               "us-east-1a",
	"meta-data/placement/availability-zone-id":                            "use1-az4",
	"meta-data/placement/region":                                          "us-east-1",
	"meta-data/profile":                                                   "default-hvm",
	"meta-data/public-hostname":                                           "ec2-203-0-113-25.compute-1.amazonaws.com",
	"meta-data/public-ipv4":                                               "203.0.113.25",
	"meta-data/public-keys/0/openssh-key":                                 "ssh-rsa AAAA " + Mark,
	"meta-data/reservation-id":                                            "r-0efghijk987654321",
	"meta-data/security-groups":                                           "nodes " + Mark,
	"meta-data/services/domain":                                           "amazonaws.com",
	"meta-data/services/partition":                                        "aws",
	"meta-data/tags/instance/Name":                                        Mark,
	"meta-data/identity-credentials/ec2/info":                             `{"Code":"Success","LastUpdated":"2026-01-01T00:00:00Z","AccountId":"123456789012"}`,
	"meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id":          "vpc-0123456789abcdef0",
	"meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/subnet-id":       "subnet-0123456789abcdef0",
	"meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/local-ipv4s":     "172.30.0.11",
	"meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/security-groups": "nodes " + Mark,
	"meta-data/identity-credentials/ec2/security-credentials/ec2-instance": `{"Code":"Success","Type":"AWS-HMAC",` +
		`"LastUpdated":"2026-01-01T00:00:00Z","AccessKeyId":"ASIA-` + Mark + `","SecretAccessKey":"` + Mark + `","Token":"` + Mark + `","Expiration":"2099-01-01T00:00:00Z"}`,
}

// Set changes a value of the tree, by its path below /latest/.
func (s *Server) Set(path, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tree[path] = value
}

// SetHopLimit sets how many hops an answer to the token PUT survives, 2 at first: what EKS sets for nodes with pods. EC2's own
// default is 1.
func (s *Server) SetHopLimit(hops int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hopLimit = hops
}

type connKey struct{}

// Serve answers on ln until it is closed.
func (s *Server) Serve(ln net.Listener) error {
	srv := &http.Server{
		Handler: s, ReadHeaderTimeout: 5 * time.Second,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	if err := srv.Serve(ln); !errors.Is(err, net.ErrClosed) && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the metadata endpoint on %s: %w", ln.Addr(), err)
	}
	return nil
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	source := netip.MustParseAddrPort(r.RemoteAddr).Addr().Unmap()
	local, _ := netip.ParseAddrPort(r.Context().Value(http.LocalAddrContextKey).(net.Addr).String())
	status, body, header := s.answer(source, r)
	s.mu.Lock()
	s.requests = append(s.requests, Request{
		Time: time.Now(), Source: source, Local: local,
		Method: r.Method, Target: r.RequestURI, Header: r.Header.Clone(), Status: status,
	})
	hops := s.hopLimit
	s.mu.Unlock()
	if r.Method == http.MethodPut {
		// The real endpoint limits how far its token travels, so that it does not pass a proxy or a bridge unseen.
		if c, ok := r.Context().Value(connKey{}).(net.Conn); ok {
			setHopLimit(c, local.Addr(), hops)
		}
	}
	maps.Copy(w.Header(), header)
	w.Header().Set("Content-Type", "text/plain")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	fmt.Fprint(w, body)
}

func (s *Server) answer(source netip.Addr, r *http.Request) (status int, body string, header http.Header) {
	path := strings.TrimPrefix(r.URL.Path, "/latest/")
	if r.Method == http.MethodPut && path == "api/token" {
		const name = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
		ttl, err := strconv.Atoi(r.Header.Get(name))
		if err != nil || ttl < 1 || ttl > 21600 {
			return http.StatusBadRequest, "", nil
		}
		if r.Header.Get("X-Forwarded-For") != "" {
			return http.StatusForbidden, "", nil
		}
		token := make([]byte, 28)
		rand.Read(token)
		t := "AQAE" + hex.EncodeToString(token)
		s.mu.Lock()
		s.tokens[t] = time.Now().Add(time.Duration(ttl) * time.Second)
		s.mu.Unlock()
		return http.StatusOK, t, http.Header{name: {strconv.Itoa(ttl)}}
	}
	s.mu.Lock()
	end, ok := s.tokens[r.Header.Get("X-Aws-Ec2-Metadata-Token")]
	s.mu.Unlock()
	if !ok || time.Now().After(end) {
		return http.StatusUnauthorized, "", nil
	}
	if r.Method != http.MethodGet {
		return http.StatusMethodNotAllowed, "", nil
	}
	if body, ok := s.get(source, path); ok {
		return http.StatusOK, body, nil
	}
	return http.StatusNotFound, "", nil
}

func (s *Server) get(source netip.Addr, path string) (string, bool) {
	s.mu.Lock()
	tree := maps.Clone(s.tree)
	s.mu.Unlock()
	if s.Credentials != nil {
		if c, ok := s.Credentials(source); ok {
			doc, _ := json.Marshal(map[string]string{
				"Code": "Success", "Type": "AWS-HMAC", "LastUpdated": time.Now().UTC().Format(time.RFC3339),
				"AccessKeyId": c.AccessKeyID, "SecretAccessKey": c.SecretAccessKey, "Token": c.SessionToken,
				"Expiration": c.Expires.UTC().Format(time.RFC3339),
			})
			tree["meta-data/iam/security-credentials/"+c.Role] = string(doc)
			tree["meta-data/iam/info"] = `{"Code":"Success","LastUpdated":"2026-01-01T00:00:00Z",` +
				`"InstanceProfileArn":"arn:aws:iam::123456789012:instance-profile/` + c.Role + `","InstanceProfileId":"AIPA` + Mark + `"}`
		}
	}
	if v, ok := tree[strings.TrimSuffix(path, "/")]; ok {
		return v, true
	}
	// A directory: its entries, those with entries of their own with a slash.
	dir := strings.TrimSuffix(path, "/") + "/"
	entries := map[string]bool{}
	for p := range tree {
		rest, ok := strings.CutPrefix(p, strings.TrimPrefix(dir, "/"))
		if !ok {
			continue
		}
		name, _, sub := strings.Cut(rest, "/")
		if sub {
			name += "/"
		}
		entries[name] = true
	}
	if len(entries) == 0 {
		return "", false
	}
	return strings.Join(slices.Sorted(maps.Keys(entries)), "\n"), true
}

func setHopLimit(c net.Conn, local netip.Addr, hops int) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return
	}
	rc.Control(func(fd uintptr) {
		if local.Unmap().Is4() {
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_TTL, hops)
		} else {
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_UNICAST_HOPS, hops)
		}
	})
}

// Requests are those of the sources, all when there are none, in the order of their arrival.
func (s *Server) Requests(sources ...netip.Addr) []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	var rs []Request
	for _, r := range s.requests {
		if len(sources) == 0 || slices.Contains(sources, r.Source) {
			rs = append(rs, r)
		}
	}
	return rs
}
