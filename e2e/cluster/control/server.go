package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
)

// Owner says whose an access key is. NodeIndex is set for a node's own.
type Owner struct {
	aws.Owner
	NodeIndex int
}

// Server answers Clients. It is an http.Handler and safe for concurrent use.
type Server struct {
	aws      *aws.Server
	endpoint *aws.Endpoint
	imds     *imds.Server
	mux      *http.ServeMux

	mu     sync.Mutex
	nodes  map[int]aws.Credentials // that the metadata endpoint answers now
	owners map[string]int          // node by access key
	faults map[int]func()
	fault  int
}

// NewServer joins the stand-ins.
func NewServer(a *aws.Server, endpoint *aws.Endpoint, m *imds.Server) *Server {
	s := &Server{
		aws: a, endpoint: endpoint, imds: m, mux: http.NewServeMux(),
		nodes: map[int]aws.Credentials{}, owners: map[string]int{}, faults: map[int]func(){},
	}
	s.handle("POST /aws/role", func(r *http.Request) (any, error) {
		var role aws.Role
		if err := json.NewDecoder(r.Body).Decode(&role); err != nil {
			return nil, err
		}
		return nil, a.SetRole(role)
	})
	s.handle("GET /aws/calls", func(r *http.Request) (any, error) {
		after, err := strconv.Atoi(r.FormValue("after"))
		if err != nil {
			return nil, err
		}
		all := a.Calls()
		return all[min(after, len(all)):], nil
	})
	s.handle("GET /aws/owner", func(r *http.Request) (any, error) {
		key := r.FormValue("key")
		owner, ok := a.Owner(key)
		if !ok {
			return nil, fmt.Errorf("access key %q was never issued", key)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		return Owner{owner, s.owners[key]}, nil
	})
	s.handle("POST /aws/fault", s.inject)
	s.handle("DELETE /aws/fault", s.removeFault)
	s.handle("POST /aws/session-length", func(r *http.Request) (any, error) {
		var d time.Duration
		if err := json.NewDecoder(r.Body).Decode(&d); err != nil {
			return nil, err
		}
		a.SetSessionLength(d)
		return nil, nil
	})
	s.handle("POST /aws/start", func(*http.Request) (any, error) { return nil, endpoint.Start() })
	s.handle("POST /aws/kill", func(*http.Request) (any, error) { return nil, endpoint.Kill() })
	s.handle("GET /imds/requests", func(r *http.Request) (any, error) {
		after, err := strconv.Atoi(r.FormValue("after"))
		if err != nil {
			return nil, err
		}
		all := m.Requests()
		return all[min(after, len(all)):], nil
	})
	s.handle("GET /imds/packets", func(r *http.Request) (any, error) { return m.Packets(r.Context()) })
	return s
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

func (s *Server) handle(pattern string, answer func(*http.Request) (any, error)) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		v, err := answer(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		json.NewEncoder(w).Encode(v)
	})
}

func (s *Server) inject(r *http.Request) (any, error) {
	var f aws.Fault
	if err := json.NewDecoder(r.Body).Decode(&f); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault++
	s.faults[s.fault] = s.aws.Inject(f)
	return s.fault, nil
}

func (s *Server) removeFault(r *http.Request) (any, error) {
	id, err := strconv.Atoi(r.FormValue("id"))
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	remove, ok := s.faults[id]
	if !ok {
		return nil, errors.New("there is no such fault")
	}
	delete(s.faults, id)
	remove()
	return nil, nil
}

// NodeCredentials are what the metadata endpoint answers a node and, where nothing keeps them away, its pods: the same for
// hours, as the real one.
func (s *Server) NodeCredentials(source netip.Addr) (imds.Credentials, bool) {
	node, _ := NodeOf(source)
	if node == 0 {
		return imds.Credentials{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.nodes[node]
	if time.Until(c.Expires) < time.Hour {
		var err error
		if c, err = s.aws.NodeCredentials(); err != nil {
			return imds.Credentials{}, false
		}
		s.nodes[node], s.owners[c.AccessKeyID] = c, node
	}
	return imds.Credentials{
		Role: "node-role", AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey,
		SessionToken: c.SessionToken, Expires: c.Expires,
	}, true
}
